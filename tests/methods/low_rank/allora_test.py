"""ALLoRA: LoRA's value, and gradients that are scaled per output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank import allora as lib
from jlora.methods.low_rank.allora import ALLoRA

ETA = 1.7


def gradients(bench, adapter):
    """(loss, gradients of the trained arrays, of x) by lift, as float64."""
    tuned = jl.lift(bench.model)

    def loss(trainable, x):
        return jnp.sum(jnp.sin(tuned(bench.params, adapter.replace(trainable=trainable), x)))

    g, g_x = jax.jit(jax.grad(loss, (0, 1)))(adapter.trainable, bench.x)
    return {k: np.asarray(v, "f8") for k, v in g["w"].items()}, np.asarray(g_x, "f8")


def check_value(bench):
    adapter = bench.noisy(ALLoRA(rank=2, eta=ETA))
    p = bench.numbers(adapter)
    merged = bench.w + p["a"] @ p["b"]
    bench.agree(adapter, merged)
    x = np.asarray(bench.x, "f8").reshape(-1, 12)
    cotangent = np.cos(x @ merged)
    c = (np.linalg.norm(p["a"] @ p["b"], axis=0) + ETA**-2) ** -0.5
    g, g_x = gradients(bench, adapter)
    full = x.T @ cotangent
    np.testing.assert_allclose(g["a"], full * c @ p["b"].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g["b"], p["a"].T @ full * c, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g_x.reshape(-1, 12), cotangent @ merged.T, rtol=1e-4, atol=1e-4)


def test_value_and_gradients(bench):
    check_value(bench)


def test_the_merged_weight_has_the_same_gradients(bench):
    adapter = bench.noisy(ALLoRA(rank=2, eta=ETA))

    def loss(trainable):
        merged = jl.merge(bench.params, adapter.replace(trainable=trainable))
        return jnp.sum(jnp.sin(bench.model(merged, bench.x)))

    want, _ = gradients(bench, adapter)
    found = jax.jit(jax.grad(loss))(adapter.trainable)["w"]
    for name in "ab":
        np.testing.assert_allclose(found[name], want[name], rtol=1e-4, atol=1e-4)


def test_limit_a_fresh_adapter_learns_eta_times_as_fast_as_lora(bench):
    """While the delta is zero c is eta; at eta 1 the first gradients are LoRA's."""
    plain = bench.fresh(jl.LoRA(rank=2, alpha=2.0))
    want, _ = gradients(bench, plain)
    for eta in (1.0, 3.0):
        found, _ = gradients(bench, bench.fresh(ALLoRA(rank=2, eta=eta)))
        np.testing.assert_array_equal(found["a"], 0)
        np.testing.assert_allclose(found["b"], eta * want["b"], rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"ALLoRA\.rank: got 0, expected"):
        ALLoRA(rank=0)
    with pytest.raises(ValueError, match=r"ALLoRA\.eta: got -1\.0, expected a positive number"):
        ALLoRA(eta=-1.0)


def test_mutation_squared_norms_are_seen(bench, monkeypatch):
    wrong = lambda a, b, eta: jax.lax.rsqrt(jnp.sum((a @ b) ** 2, 0) + eta**-2)  # noqa: E731
    monkeypatch.setattr(lib, "gradient_factors", wrong)
    with pytest.raises(AssertionError):
        check_value(bench)
