"""Rows that use different adapters of a bank: the values of one by one, and no copy of the bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.serving import bank as module

METHODS = {
    "lora": jl.LoRA(rank=2),
    "dora": jl.DoRA(rank=2),
    "decomposed": jl.Decomposed(jl.LoHa(rank=2)),
    "lokr": jl.LoKr(rank=2),
    "vera": jl.VeRA(rank=3),
    "ia3": jl.IA3(),
    "oft": jl.OFT(block=2),
    "experts": jl.Experts(experts=3, rank=2, top_k=2),
}
LAYERS, WIDTH, N = 3, 4, 5
WHICH = jnp.asarray([4, 0, 0, 2], jnp.int32)


def model(p, x):
    """Three scanned layers and a head."""
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return x @ p["head"]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"layers": draw(0, LAYERS, WIDTH, WIDTH), "head": draw(1, WIDTH, 6)}
X = draw(2, 4, 7, WIDTH)
TUNED = jl.lift(model)


def bank(method):
    """N adapters with noise in everything that is trained."""

    def one(seed):
        fresh = jl.init(jax.random.key(seed), model, PARAMS, X[0], methods={"layers|head": method})
        leaves, tree = jax.tree.flatten(fresh.trainable)
        noisy = [t + 0.3 * draw(100 * seed + k, *t.shape) for k, t in enumerate(leaves)]
        return fresh.replace(trainable=jax.tree.unflatten(tree, noisy))

    return jl.stack([one(seed) for seed in range(N)])


def mixed(adapters, which=WHICH, x=X):
    return jax.vmap(lambda i, x: TUNED(PARAMS, adapters[i], x))(which, x)


def check_rows(name):
    adapters = bank(METHODS[name])
    got = mixed(jl.serving_bank(adapters))
    one_by_one = [TUNED(PARAMS, adapters[int(i)], x) for i, x in zip(WHICH, X, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(one_by_one), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_their_adapters_one_by_one(name):
    check_rows(name)


def test_value_by_numpy():
    adapters = bank(METHODS["lora"])
    t, f = (jax.tree.map(np.float64, part) for part in (adapters.trainable, adapters.frozen))

    def weight(path, i, w):
        return w + f[path]["scale"][i][..., None, None] * (t[path]["a"][i] @ t[path]["b"][i])

    for row, i in enumerate(np.asarray(WHICH)):
        x = np.float64(X[row])
        for w in weight("layers", i, np.float64(PARAMS["layers"])):
            x = np.tanh(x @ w)
        want = x @ weight("head", i, np.float64(PARAMS["head"]))
        np.testing.assert_allclose(
            mixed(jl.serving_bank(adapters))[row], want, rtol=1e-5, atol=1e-5
        )


def test_gradients_reach_the_bank():
    adapters = bank(METHODS["lora"])

    def loss(trainable, order):
        full = adapters.replace(trainable=trainable)
        return jnp.sum(mixed(order(full)) ** 2)

    got = jax.grad(loss)(adapters.trainable, jl.serving_bank)
    want = jax.grad(loss)(adapters.trainable, lambda full: full)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)
    assert not np.any(got["head"]["a"][1]) and np.any(got["head"]["a"][2])  # 1 is in no row


def test_one_of_them_merges_and_has_a_delta():
    adapters = bank(METHODS["dora"])
    served = jl.serving_bank(adapters)
    assert len(served) == N
    for i in (0, 3, -1):
        for fn in (jl.merge, jl.delta):
            jax.tree.map(
                np.testing.assert_array_equal, fn(PARAMS, served[i]), fn(PARAMS, adapters[i])
            )


def test_nothing_but_the_rows_of_a_layer_is_gathered():
    adapters = bank(METHODS["lora"])

    def largest_gather(order):
        jaxpr = jax.make_jaxpr(lambda a: mixed(a))(order(adapters))
        sizes = [
            eqn.outvars[0].aval.size
            for eqn in _equations(jaxpr.jaxpr)
            if "gather" in str(eqn.primitive)
        ]
        return max(sizes)

    rows, rank = len(WHICH), METHODS["lora"].rank
    assert largest_gather(lambda a: a) == rows * LAYERS * WIDTH * rank
    assert largest_gather(jl.serving_bank) == rows * 6 * rank  # the head's B, [rank, 6] a row


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_other_rows_and_another_bank_compile_nothing():
    run = jax.jit(mixed)
    served = jl.serving_bank(bank(METHODS["lora"]))
    run(served, WHICH)
    run(jax.tree.map(lambda t: t * 0.5 if t.dtype == jnp.float32 else t, served), WHICH[::-1])
    assert run._cache_size() == 1


def test_refusals():
    adapters = bank(METHODS["lora"])
    with pytest.raises(ValueError, match="expected a bank"):
        jl.serving_bank(adapters[0])
    with pytest.raises(IndexError, match="adapter 5: the bank has 5"):
        jl.serving_bank(adapters)[5]
    with pytest.raises(IndexError, match="adapter -6: the bank has 5"):
        jl.serving_bank(adapters)[np.int64(-6)]
    with pytest.raises(ValueError, match="already in serving order"):
        jl.serving_bank(jl.serving_bank(adapters)[0])


def test_spread_is_a_product_in_value_and_slopes():
    h, v = draw(3, 5, 7, 3), draw(4, 3, 6)
    sums = jax.make_jaxpr(module.spread)(h, v)
    assert not any(e.primitive.name == "dot_general" for e in _equations(sums.jaxpr))
    np.testing.assert_allclose(module.spread(h, v), h @ v, rtol=1e-5, atol=1e-6)
    for fn in (
        lambda spread: jax.grad(lambda h, v: jnp.sum(jnp.tanh(spread(h, v))), (0, 1))(h, v),
        lambda spread: jax.jvp(spread, (h, v), (h + 1, v - 1))[1],
        lambda spread: jax.jacfwd(jax.grad(lambda v: jnp.sum(spread(h, v) ** 3)))(v),
    ):
        got, want = fn(module.spread), fn(jnp.matmul)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)
    low = module.spread(h.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    exact = h.astype(jnp.bfloat16).astype(float) @ v.astype(jnp.bfloat16).astype(float)
    np.testing.assert_allclose(low.astype(float), exact, rtol=2**-8)  # rounded once


@pytest.mark.parametrize(("rank", "sums"), [(module.THIN, True), (module.THIN + 1, False)])
def test_thin_factors_are_a_sum_and_others_the_methods_own(rank, sums):
    served = jl.serving_bank(bank(jl.LoRA(rank=rank)))
    jaxpr = jax.make_jaxpr(lambda s: mixed(s))(served)
    dots = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == (4 if sums else 6)  # x W and x A of the scan's body and of the head


def test_dropout_of_rows_is_the_methods_own():
    adapters = bank(jl.LoRA(rank=2, dropout=0.5))
    run = jax.vmap(
        lambda i, x, a: TUNED(PARAMS, a[i], x, ctx={"key": jax.random.key(7)}), (0, 0, None)
    )
    got, want = (run(WHICH, X, a) for a in (jl.serving_bank(adapters), adapters))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - mixed(adapters)).max() > 0.01


def break_pick(patch):
    def first(p):
        return real(p | {module.INDEX: jnp.zeros((), jnp.int32)})

    real = module._picked
    patch.setattr(module, "_picked", first)


def break_spread(patch):
    patch.setattr(module, "spread", lambda h, v: h[..., 1:] @ v[1:])


@pytest.mark.parametrize("broken", [break_pick, break_spread])
def test_a_broken_piece_is_noticed(monkeypatch, broken):
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_rows("lora")
