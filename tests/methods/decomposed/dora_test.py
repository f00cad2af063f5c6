"""DoRA: closed-form norms, the magnitude vector, the detached gradient, no dense V."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.decomposed import dora
from jlora.methods.decomposed.dora import DoRA


def check_value(bench):
    adapter = bench.noisy(DoRA(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    v = bench.w + 2 * p["a"] @ p["b"]
    bench.agree(adapter, v * p["m"] / np.linalg.norm(v, axis=0))


def test_value(bench):
    check_value(bench)


def test_columns_have_length_m(bench):
    adapter = bench.noisy(DoRA(rank=3))
    lengths = np.linalg.norm(bench.merged(adapter), axis=0)
    np.testing.assert_allclose(lengths, np.abs(bench.numbers(adapter)["m"]), rtol=1e-5)


def test_gradients_take_the_norm_as_a_constant(bench):
    adapter = bench.noisy(DoRA(rank=2))
    p = bench.numbers(adapter)
    dy = np.random.default_rng(3).normal(size=(3, 5, 8))

    def loss(trainable):
        y = bench.forward(adapter.replace(trainable=trainable))
        return jnp.sum(y * jnp.asarray(dy, y.dtype))

    got = jax.grad(loss)(adapter.trainable)["w"]
    x, g = np.asarray(bench.x, np.float64).reshape(15, 12), dy.reshape(15, 8)
    s = p["scale"]
    norm = np.linalg.norm(bench.w + s * p["a"] @ p["b"], axis=0)
    dv = (x.T @ g) * p["m"] / norm  # W' = V m / const
    np.testing.assert_allclose(got["a"], s * dv @ p["b"].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got["b"], s * p["a"].T @ dv, rtol=1e-3, atol=1e-4)
    v = bench.w + s * p["a"] @ p["b"]
    np.testing.assert_allclose(got["m"], np.sum((x @ v) * g, 0) / norm, rtol=1e-3, atol=1e-4)


def test_the_step_forms_no_dense_weight(bench):
    adapter = bench.noisy(DoRA(rank=2))

    def loss(trainable):
        return jnp.sum(bench.forward(adapter.replace(trainable=trainable)) ** 2)

    lines = str(jax.make_jaxpr(jax.grad(loss))(adapter.trainable)).splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert products and not any(":f32[12,8]" in line for line in products)


def test_limit_a_column_of_zeros_stays_zero_and_finite(bench):
    params = {"w": bench.params["w"].at[:, 2].set(0)}
    site = jl.sites(bench.model, params, bench.x)
    adapter = jl.init(jax.random.key(0), bench.model, params, bench.x, methods={"w": DoRA(rank=2)})
    y = jl.lift(bench.model)(params, adapter, bench.x)
    assert len(site) == 1 and not np.any(y[..., 2]) and np.all(np.isfinite(y))


def test_norms_in_bfloat16_bases_are_float32(bench):
    w = bench.params["w"].astype(jnp.bfloat16)
    a, b = jnp.ones((12, 2)) * 0.1, jnp.ones((2, 8)) * 0.2
    got = dora.column_norms(w, a, b, jnp.asarray(0.5))
    want = np.linalg.norm(np.asarray(w, np.float64) + 0.5 * np.asarray(a @ b, np.float64), axis=0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"DoRA\.rank: got 0, expected an integer of at least 1"):
        DoRA(rank=0)


def test_mutation_a_missing_cross_term_is_seen(bench, monkeypatch):
    def wrong(w, a, b, scale):
        d = scale * (a @ b)
        return jnp.sqrt(jnp.sum(w * w, axis=0) + jnp.sum(d * d, axis=0))

    monkeypatch.setattr(dora, "column_norms", wrong)
    with pytest.raises(AssertionError):
        check_value(bench)
