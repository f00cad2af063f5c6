"""LN tuning: a gain and a bias by numpy, what is trained, and what is no vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl

N = 6


def model(params, x):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return (normed * params["norm"]["scale"][None] + params["norm"]["bias"][None]) @ params["w"]


def case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    params = {"norm": {"scale": 1 + draw(N), "bias": draw(N)}, "w": draw(N, N)}
    return params, draw(3, N)


def numpy_model(scale, bias, w, x):
    x = np.asarray(x, np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return (normed * scale + bias) @ np.asarray(w, np.float64)


def test_value_by_numpy_and_the_base_at_the_start():
    params, x = case()
    fresh = jl.init(jax.random.key(0), model, params, x, methods={"norm/": jl.LNTuning()})
    assert [s.path for s, _ in fresh.sites] == ["norm/bias", "norm/scale"]
    np.testing.assert_array_equal(jl.lift(model)(params, fresh, x), model(params, x))
    new = {"norm/scale": np.linspace(0.5, 2, N), "norm/bias": np.linspace(-1, 1, N)}
    adapter = fresh.replace(
        trainable={k: {"v": jnp.asarray(v, jnp.float32)} for k, v in new.items()}
    )
    want = numpy_model(new["norm/scale"], new["norm/bias"], params["w"], x)
    np.testing.assert_allclose(jl.lift(model)(params, adapter, x), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model(jl.merge(params, adapter), x), want, rtol=1e-4, atol=1e-5)


def test_gains_alone_are_trained_in_float32_on_a_low_precision_base():
    params, x = case(jnp.bfloat16)
    fresh = jl.init(jax.random.key(0), model, params, x, methods={"norm/scale": jl.LNTuning()})
    assert {k: t["v"].dtype for k, t in fresh.trainable.items()} == {"norm/scale": jnp.float32}
    merged = jl.merge(params, fresh)
    assert (
        merged["norm"]["scale"].dtype == jnp.bfloat16
        and merged["norm"]["bias"] is (params["norm"]["bias"])
    )


def test_a_matrix_is_refused_by_its_path():
    params, x = case()
    with pytest.raises(ValueError, match=r"w: LNTuning trains vectors; got a matrix \[6, 6\]"):
        jl.init(jax.random.key(0), model, params, x, methods={"w": jl.LNTuning()})
    with pytest.raises(ValueError, match="matches only leaves that no matmul consumes"):
        jl.init(jax.random.key(0), model, params, x, methods={"norm": jl.LoRA()})


class Added(jl.LNTuning):
    """The mutation: a difference, where the definition has the whole vector."""

    def merge(self, w, p):
        return w + p["v"][None, :]


def test_mutation_a_difference_is_not_the_vector():
    params, x = case()
    fresh = jl.init(jax.random.key(0), model, params, x, methods={"norm/": Added()})
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(jl.lift(model)(params, fresh, x), model(params, x), rtol=1e-3)
