"""Merging: by numpy, shared arrays, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl


def leaf(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def fn(p, x):
    h = jnp.einsum("ltd,ldnh->ltnh", x, p["w"])
    return h + p["b"][None, None]


PARAMS = {"w": leaf(2, 3, 4, 5), "b": leaf(4, 5), "n": [leaf(3), 7]}


def adapter(params):
    a = jl.init(
        jax.random.key(0),
        fn,
        params,
        leaf(2, 7, 3, dtype=params["w"].dtype),
        methods={"w": jl.LoRA(2, 6.0)},
    )
    return a.replace(trainable=jax.tree.map(lambda t: t + 0.5, a.trainable))


def test_merge_by_numpy_and_base_untouched():
    """L7: base arrays are the same objects, all other leaves are shared."""
    a, before = adapter(PARAMS), np.asarray(PARAMS["w"]).copy()
    out = jl.merge(PARAMS, a)
    t = a.trainable["w"]
    delta = 3.0 * np.einsum("lir,lro->lio", t["a"], t["b"])
    np.testing.assert_allclose(out["w"], before + delta.reshape(2, 3, 4, 5), rtol=1e-5)
    np.testing.assert_allclose(jl.delta(PARAMS, a)["w"], delta, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(PARAMS["w"], before)
    assert out["b"] is PARAMS["b"] and out["n"][0] is PARAMS["n"][0] and out["n"][1] == 7


def test_bfloat16_base():
    """L12: merged in float32, cast once; lifted keeps the model's dtypes."""
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"].astype(jnp.bfloat16)}
    a, x = adapter(params), leaf(2, 7, 3, dtype=jnp.bfloat16)
    assert a.trainable["w"]["a"].dtype == jnp.float32
    out = jl.merge(params, a)
    t = a.trainable["w"]
    delta = 3.0 * np.einsum("lir,lro->lio", t["a"], t["b"]).reshape(2, 3, 4, 5)
    exact = jnp.asarray(np.asarray(params["w"], np.float32) + delta, jnp.bfloat16)
    assert out["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out["w"], np.float32), np.asarray(exact, np.float32))
    y = jl.lift(fn)(params, a, x)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(fn(out, x), np.float32)
    assert np.abs(np.asarray(y, np.float32) - expected).max() <= 0.03 * np.abs(expected).max()


def test_float32_products_of_a_bfloat16_model_stay_float32():
    def wide(p, x):
        return jnp.einsum("td,df->tf", x, p["w"], preferred_element_type=jnp.float32)

    params, x = {"w": leaf(3, 4, dtype=jnp.bfloat16)}, leaf(2, 3, dtype=jnp.bfloat16)
    a = jl.init(jax.random.key(0), wide, params, x, methods={"w": jl.LoRA(2)})
    assert jl.lift(wide)(params, a, x).dtype == jnp.float32


def test_a_cast_model_merges_before_it_casts():
    """A float32 weight that the model casts: the delta is added in float32, not after the cast."""

    def cast(p, x):
        return x @ p["w"].astype(jnp.bfloat16)

    class Dense(jl.LoRA):
        def apply(self, x, w, p, ctx):
            return x @ w.merged(self, p)

    params, x = {"w": leaf(3, 4)}, leaf(2, 3, dtype=jnp.bfloat16)
    a = jl.init(jax.random.key(0), cast, params, x, methods={"w": Dense(2)})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 1e-3, a.trainable))
    np.testing.assert_array_equal(
        np.asarray(jl.lift(cast)(params, a, x), np.float32),
        np.asarray(cast(jl.merge(params, a), x), np.float32),
    )


KINDS = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("made", KINDS)
def test_a_merged_leaf_keeps_its_own_dtype(made):
    """Not that of the parameters that the adapter was made on; rounded once, to that."""
    a = adapter({k: v.astype(made) for k, v in PARAMS.items() if k != "n"})
    t = {k: np.asarray(v, np.float64) for k, v in a.trainable["w"].items()}
    delta = 3.0 * np.einsum("lir,lro->lio", t["a"], t["b"]).reshape(2, 3, 4, 5)
    for kind in KINDS:
        params = {k: v.astype(kind) for k, v in PARAMS.items() if k != "n"}
        out = jl.merge(params, a)["w"]
        assert out.dtype == kind
        want = np.asarray(params["w"], np.float64) + delta
        eps = float(jnp.finfo(kind).eps)
        np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0.6 * eps, atol=1e-6)
        y = jl.lift(fn)(params, a, leaf(2, 7, 3, dtype=kind))
        assert y.dtype == kind


def test_a_base_of_float32_is_not_rounded_by_an_adapter_made_in_bfloat16():
    """Neither merged nor lifted, in a matmul or a lookup."""

    def both(p, ids):
        return jnp.take(p["e"], ids, axis=0) @ p["e"].T

    params, ids = {"e": leaf(6, 4)}, jnp.asarray([1, 5, 1])
    half = {"e": params["e"].astype(jnp.bfloat16)}
    a = jl.init(jax.random.key(0), both, half, ids, methods={"e": jl.LoRA(2)})
    assert a.sites[0][0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(jl.merge(params, a)["e"], params["e"])
    np.testing.assert_array_equal(jl.lift(both)(params, a, ids), both(params, ids))
