"""Decomposed: norms in closed form, by column or row, DoRA as limit, detached gradient, banks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.decomposed import decomposed
from jlora.methods.decomposed.decomposed import Decomposed

METHODS = {
    "loha": jl.LoHa(rank=2, alpha=6.0),
    "lokr": jl.LoKr(rank=1, alpha=2.0, factor=2),
    "lokr_whole": jl.LoKr(rank=8, factor=4),
}


def delta(name, p):
    """By numpy, from the equations of LoHa and LoKr."""
    if name == "loha":
        return p["scale"] * (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"])
    second = p["a2"] @ p["b2"] if "a2" in p else p["w2"]
    return p["scale"] * np.kron(p["w1"], second)


def check_value(bench, name):
    adapter = bench.noisy(Decomposed(METHODS[name]))
    p = bench.numbers(adapter)
    v = bench.w + delta(name, p)
    bench.agree(adapter, v * p["m"] / np.linalg.norm(v, axis=0))


@pytest.mark.parametrize("name", METHODS)
def test_value(bench, name):
    check_value(bench, name)


def check_rows(bench, name):
    adapter = bench.noisy(Decomposed(METHODS[name], by="in"))
    p = bench.numbers(adapter)
    assert p["m"].shape == (1, 12)
    v = bench.w + delta(name, p)
    bench.agree(adapter, v * (p["m"][0] / np.linalg.norm(v, axis=1))[:, None])


@pytest.mark.parametrize("name", METHODS)
def test_value_by_rows(bench, name):
    check_rows(bench, name)


def test_rows_have_length_m_and_the_norm_is_a_constant(bench):
    adapter = bench.noisy(Decomposed(METHODS["loha"], by="in"))
    p, dy = bench.numbers(adapter), np.random.default_rng(3).normal(size=(3, 5, 8))
    lengths = np.linalg.norm(bench.merged(adapter), axis=1)
    np.testing.assert_allclose(lengths, np.abs(p["m"][0]), rtol=1e-5)

    def loss(trainable):
        y = bench.forward(adapter.replace(trainable=trainable))
        return jnp.sum(y * jnp.asarray(dy, y.dtype))

    got = jax.grad(loss)(adapter.trainable)["w"]
    x, g = np.asarray(bench.x, np.float64).reshape(15, 12), dy.reshape(15, 8)
    v = bench.w + delta("loha", p)
    norm = np.linalg.norm(v, axis=1)
    dv = p["scale"] * (p["m"][0] / norm)[:, None] * (x.T @ g)
    want = (dv * (p["a2"] @ p["b2"])) @ p["b1"].T
    np.testing.assert_allclose(got["a1"], want, rtol=1e-3, atol=1e-3)
    want = np.sum(x * (g @ v.T), axis=0) / norm
    np.testing.assert_allclose(got["m"][0], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_norms_that_nearly_cancel_a_kronecker_product(axis):
    rng = np.random.default_rng(6)
    a, c, w = (rng.normal(size=s) for s in ((3, 2), (4, 5), (12, 10)))
    some = (slice(None), slice(3)) if axis == 0 else (slice(3),)
    w[some] = 1e-3 * w[some] - np.kron(a, c)[some]
    w, a, c = (np.asarray(t, np.float32) for t in (w, a, c))
    want = np.linalg.norm(w.astype(float) + np.kron(a.astype(float), c), axis=axis)
    got = decomposed.kron_norms(*map(jnp.asarray, (w, a, c)), axis=axis)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_rows_of_a_channel_have_one_length():
    """Flax has the window before the channels, torch after them."""
    norms = jnp.arange(1.0, 7.0)
    np.testing.assert_allclose(
        decomposed._together(norms, (1, 2)), np.sqrt([[1 + 9 + 25, 4 + 16 + 36]]), rtol=1e-6
    )
    np.testing.assert_allclose(
        decomposed._together(norms, (2, 1)), np.sqrt([[1 + 4 + 9], [16 + 25 + 36]]), rtol=1e-6
    )
    for gains, want in (
        (jnp.array([[1, 2]]), [1, 2] * 3),
        (jnp.array([[1], [2]]), [1] * 3 + [2] * 3),
    ):
        np.testing.assert_array_equal(decomposed._rows(gains, 6), want)


def test_limit_with_lora_it_is_dora(bench):
    dora = bench.noisy(jl.DoRA(rank=3, alpha=6.0))
    same = bench.fresh(Decomposed(jl.LoRA(rank=3, alpha=6.0)))
    assert jax.tree.map(jnp.shape, same.trainable) == jax.tree.map(jnp.shape, dora.trainable)
    same = same.replace(trainable=dora.trainable)
    np.testing.assert_allclose(bench.merged(same), bench.merged(dora), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bench.forward(same), bench.forward(dora), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_columns_have_length_m_and_the_norm_is_a_constant(bench, name):
    adapter = bench.noisy(Decomposed(METHODS[name]))
    p, dy = bench.numbers(adapter), np.random.default_rng(3).normal(size=(3, 5, 8))
    lengths = np.linalg.norm(bench.merged(adapter), axis=0)
    np.testing.assert_allclose(lengths, np.abs(p["m"]), rtol=1e-5)

    def loss(trainable):
        y = bench.forward(adapter.replace(trainable=trainable))
        return jnp.sum(y * jnp.asarray(dy, y.dtype))

    got = jax.grad(loss)(adapter.trainable)["w"]
    x, g = np.asarray(bench.x, np.float64).reshape(15, 12), dy.reshape(15, 8)
    v = bench.w + delta(name, p)
    norm = np.linalg.norm(v, axis=0)
    dv = p["scale"] * (x.T @ g) * p["m"] / norm  # W' = V m / const
    if name == "loha":
        want = {"a1": (dv * (p["a2"] @ p["b2"])) @ p["b1"].T}
    else:
        blocks = dv.reshape(2, 6, 2, 4)  # i1, i2, o1, o2
        want = {"w1": np.einsum("ijkl,jl->ik", blocks, p["a2"] @ p["b2"])}
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got["m"], np.sum((x @ v) * g, 0) / norm, rtol=1e-3, atol=1e-3)


def test_claim_lengths_are_learned_that_the_directions_alone_cannot(bench):
    """DoRA's reason: a change of lengths is of full rank, and costs d_out numbers here."""
    by = np.random.default_rng(4).uniform(0.5, 2.0, size=(1, 8))
    want = jnp.asarray(np.asarray(bench.x, np.float64) @ (bench.w * by), jnp.float32)

    def left(method):
        """What is left of the loss after a fit."""
        adapter = bench.fresh(method)
        tuned = jl.lift(bench.model)

        def step(trainable, _):
            def loss(t):
                y = tuned(bench.params, adapter.replace(trainable=t), bench.x)
                return jnp.mean((y - want) ** 2)

            value, slope = jax.value_and_grad(loss)(trainable)
            return jax.tree.map(lambda t, g: t - 0.05 * g, trainable, slope), value

        _, values = jax.jit(lambda t: jax.lax.scan(step, t, None, length=300))(adapter.trainable)
        return values[-1] / values[0]

    alone = jl.LoHa(rank=1, alpha=1.0)
    assert left(Decomposed(alone)) < 0.02 < 0.3 < left(alone)


def test_banks_of_other_alphas_and_ranks_stack(bench):
    """Ranks of the wrapped methods are padded, as their own are."""
    kinds = (jl.LoHa(1, 1.0), jl.LoHa(2, 4.0))
    ctx = {"tokens": jnp.ones((3, 5), bool)}
    tuned = lambda a: jl.lift(bench.model)(bench.params, a, bench.x, ctx=ctx)  # noqa: E731
    for wrap in (Decomposed, jl.TokenMask):
        one, two = (bench.noisy(wrap(m), seed=k) for k, m in enumerate(kinds))
        got = jax.vmap(tuned)(jl.stack([one, two]))
        for y, alone in zip(got, (one, two), strict=True):
            np.testing.assert_allclose(y, tuned(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="methods differ in more than rank"):
        jl.stack([bench.noisy(jl.TokenMask(m)) for m in (jl.LoHa(2), jl.IA3())])


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"by: expected 'out' or 'in', got 'rows'"):
        Decomposed(jl.LoHa(2), by="rows")
    with pytest.raises(ValueError, match=r"expected a method with factors, got HiRA"):
        Decomposed(jl.HiRA(2))
    with pytest.raises(ValueError, match=r"expected a method with factors, got DoRA"):
        Decomposed(jl.DoRA(2))
    with pytest.raises(ValueError, match=r"expected a method with factors, got 3"):
        Decomposed(3)
    with pytest.raises(ValueError, match="has an `m` of its own"):
        bench.fresh(Decomposed(WithLength(2)))


class WithLength(jl.LoRA):
    def init(self, key, site, context):
        trainable, frozen = super().init(key, site, context)
        return {**trainable, "m": trainable["b"][0]}, frozen


@pytest.mark.parametrize("name, right", [("lokr", "kron_norms"), ("loha", "column_norms")])
def test_mutation_a_missing_cross_term_is_seen(bench, monkeypatch, name, right):
    def wrong(w, a, c, scale=None, axis=0):
        d = jnp.kron(a, c) if scale is None else a @ c
        return jnp.sqrt(jnp.sum(w * w, axis=axis) + jnp.sum(d * d, axis=axis))

    monkeypatch.setattr(decomposed, right, wrong)
    for check in (check_value, check_rows) if name == "lokr" else (check_value,):
        with pytest.raises(AssertionError):
            check(bench, name)
