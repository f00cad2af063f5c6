"""LoRA: values by numpy, limits, variants, banks, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"w": leaf(5, 4), "e": leaf(7, 5, seed=1)}
X = leaf(3, 5, seed=2)


def linear(p, x):
    return x @ p["w"]


def lookup(p, ids):
    return p["e"][ids]


def adapter(method, fn=linear, x=X, path="w", seed=0):
    a = jl.init(jax.random.key(seed), fn, PARAMS, x, methods={path: method})
    return a.replace(trainable=jax.tree.map(lambda t: t + leaf(*t.shape, seed=9), a.trainable))


@pytest.mark.parametrize("rslora, scale", [(False, 3.0), (True, 6.0 / np.sqrt(2))])
def test_value_by_numpy(rslora, scale):
    a = adapter(jl.LoRA(2, 6.0, rslora=rslora))
    t = {k: np.asarray(v) for k, v in a.trainable["w"].items()}
    expected = X @ PARAMS["w"] + scale * (np.asarray(X) @ t["a"]) @ t["b"]
    np.testing.assert_allclose(jl.lift(linear)(PARAMS, a, X), expected, rtol=1e-4, atol=1e-5)


def test_lookup_by_numpy():
    ids = np.array([[1, 6], [0, 1]], np.int32)
    a = adapter(jl.LoRA(2, 4.0), lookup, ids, "e")
    t = {k: np.asarray(v) for k, v in a.trainable["e"].items()}
    expected = np.asarray(PARAMS["e"])[ids] + 2.0 * t["a"][ids] @ t["b"]
    np.testing.assert_allclose(jl.lift(lookup)(PARAMS, a, ids), expected, rtol=1e-4, atol=1e-5)


def test_full_rank_is_any_delta():
    """The limit: with r = d_out an adapter is an arbitrary change of W."""
    a = adapter(jl.LoRA(4, 4.0))
    change = leaf(5, 4, seed=5)
    a = a.replace(trainable={"w": {"a": change, "b": jnp.eye(4)}})
    np.testing.assert_allclose(jl.merge(PARAMS, a)["w"], PARAMS["w"] + change, rtol=1e-6)


def test_gauge():
    """(A, B) and (A G, inv(G) B) are one adapter."""
    a, g = adapter(jl.LoRA(2)), np.array([[2.0, 1.0], [0.5, 1.0]], np.float32)
    t = a.trainable["w"]
    other = a.replace(trainable={"w": {"a": t["a"] @ g, "b": np.linalg.inv(g) @ t["b"]}})
    np.testing.assert_allclose(
        jl.lift(linear)(PARAMS, a, X), jl.lift(linear)(PARAMS, other, X), rtol=1e-4, atol=1e-5
    )


def test_init():
    a = jl.init(jax.random.key(0), linear, PARAMS, X, methods={"w": jl.LoRA(64)})
    assert float(jnp.abs(a.trainable["w"]["b"]).max()) == 0
    assert float(jnp.abs(a.trainable["w"]["a"]).max()) <= 1 / np.sqrt(5)
    assert float(jnp.abs(a.trainable["w"]["a"]).max()) > 0.9 / np.sqrt(5)
    ids = np.array([0], np.int32)
    e = jl.init(jax.random.key(0), lookup, PARAMS, ids, methods={"e": jl.LoRA(64)})
    assert abs(float(jnp.std(e.trainable["e"]["a"])) - 1 / 8) < 0.02


def test_frozen_a():
    """L13: only `b` is trained, and after a step from zero it moves."""
    a = jl.init(jax.random.key(0), linear, PARAMS, X, methods={"w": jl.LoRA(2, freeze_a=True)})
    assert set(a.trainable["w"]) == {"b"} and set(a.frozen["w"]) == {"a", "scale"}
    g = jax.grad(lambda t: jnp.sum(jl.lift(linear)(PARAMS, a.replace(trainable=t), X) ** 2))(
        a.trainable
    )
    assert float(jnp.abs(g["w"]["b"]).max()) > 0


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        jl.LoRA(**bad)


def test_dropout_is_off_without_a_key_and_right_on_average():
    a, plain = adapter(jl.LoRA(2, dropout=0.5)), adapter(jl.LoRA(2))
    tuned = jl.lift(linear)
    expected = tuned(PARAMS, plain, X)
    np.testing.assert_array_equal(tuned(PARAMS, a, X), expected)
    run = jax.jit(jax.vmap(lambda k: tuned(PARAMS, a, X, ctx={"key": k})))
    many = run(jax.random.split(jax.random.key(1), 4000))
    error = jnp.abs(many.mean(0) - expected) / (many.std(0) / np.sqrt(4000))
    assert float(error.max()) < 5 and float(many.std(0).max()) > 0.1
    scaled = np.asarray(X)[:, :, None] * np.asarray(a.trainable["w"]["a"])[None]
    combos = np.array([[b >> k & 1 for k in range(5)] for b in range(32)]) * 2.0
    possible = 4.0 * np.einsum("ci,bir->bcr", combos, scaled) @ np.asarray(a.trainable["w"]["b"])
    possible = possible + np.asarray(X @ PARAMS["w"])[:, None]
    gap = np.abs(np.asarray(many)[0][:, None] - possible).max(-1).min(-1)
    assert gap.max() < 1e-4  # one of the 32 masks, entry by entry


def test_dropout_of_a_lookup_masks_tokens():
    ids = np.zeros((2000,), np.int32)
    a = adapter(jl.LoRA(2, dropout=0.5), lookup, ids, "e")
    y = jl.lift(lookup)(PARAMS, a, ids, ctx={"key": jax.random.key(0)})
    off = np.isclose(y, PARAMS["e"][0][None], atol=1e-6).all(-1).mean()
    assert 0.45 < off < 0.55


def test_dropout_of_a_convolution():
    def conv(p, x):
        return lax.conv(x, p["k"], (1, 1), "VALID")

    params, x = {"k": leaf(2, 3, 2, 2)}, leaf(1, 3, 4, 4, seed=3)
    a = jl.init(jax.random.key(0), conv, params, x, methods={"k": jl.LoRA(2, dropout=0.5)})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 1.0, a.trainable))
    many = jax.vmap(lambda k: jl.lift(conv)(params, a, x, ctx={"key": k}))(
        jax.random.split(jax.random.key(0), 2000)
    )
    expected = jl.lift(conv)(params, a, x)
    assert float(jnp.abs(many.mean(0) - expected).max()) < 0.1 * float(many.std(0).max())


def test_bank_by_vmap_keeps_the_base_matmul_in_one():
    """L5: rows of a batch, each with its own adapter; the base product is not batched."""
    bank = jl.stack([adapter(jl.LoRA(2), seed=k) for k in range(3)])
    ids, rows = jnp.array([2, 0, 2, 1]), leaf(4, 6, 5, seed=3)

    def run(ids, rows):
        return jax.vmap(lambda i, x: jl.lift(linear)(PARAMS, bank[i], x))(ids, rows)

    expected = jnp.stack(
        [jl.lift(linear)(PARAMS, bank[int(i)], x) for i, x in zip(ids, rows, strict=True)]
    )
    np.testing.assert_allclose(run(ids, rows), expected, rtol=1e-5, atol=1e-5)
    dots = [
        e for e in jax.make_jaxpr(run)(ids, rows).jaxpr.eqns if e.primitive.name == "dot_general"
    ]
    base = [e for e in dots if e.invars[1].aval.shape == (5, 4)]
    assert len(dots) == 3 and len(base) == 1
    assert base[0].params["dimension_numbers"][1] == ((), ())


def test_many_adapters_train_at_once():
    """The gradient of a bank under vmap is the gradients of its adapters."""
    bank = jl.stack([adapter(jl.LoRA(2), seed=k) for k in range(2)])

    def loss(t, a):
        return jnp.sum(jl.lift(linear)(PARAMS, a.replace(trainable=t), X) ** 2)

    both = jax.vmap(jax.grad(loss))(bank.trainable, bank)
    for k in range(2):
        one = jax.grad(loss)(bank[k].trainable, bank[k])
        jax.tree.map(
            lambda g, e, k=k: np.testing.assert_allclose(g[k], e, rtol=1e-4, atol=1e-4), both, one
        )


def test_swapping_adapters_does_not_recompile():
    """L11, also for another alpha."""
    tuned = jax.jit(lambda a, x: jl.lift(linear)(PARAMS, a, x))
    tuned(adapter(jl.LoRA(2, 4.0)), X)
    tuned(adapter(jl.LoRA(2, 16.0), seed=3), X)
    assert tuned._cache_size() == 1
