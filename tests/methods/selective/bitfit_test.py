"""BitFit: biases by numpy, next to LoRA, and what is no vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl

N, L = 4, 2


def model(params, x):
    def layer(x, p):
        return jnp.tanh(x @ p["kernel"] + p["bias"][None]), None

    return jax.lax.scan(layer, x, params)[0]


def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)  # noqa: E731
    return {"kernel": draw(L, N, N), "bias": draw(L, N)}, draw(3, N)


def test_value_by_numpy_in_a_scan_next_to_lora():
    params, x = case()
    methods = {"bias": jl.BitFit(), "kernel": jl.LoRA(rank=2, alpha=3.0)}
    fresh = jl.init(jax.random.key(0), model, params, x, methods=methods)
    np.testing.assert_allclose(jl.lift(model)(params, fresh, x), model(params, x), rtol=1e-6)
    moved = fresh.replace(trainable=jax.tree.map(lambda t: t + 0.3, fresh.trainable))
    lora, bias = moved.trainable["kernel"], np.asarray(moved.trainable["bias"]["v"], np.float64)
    np.testing.assert_allclose(bias, np.asarray(params["bias"]) + 0.3, rtol=1e-6)
    h = np.asarray(x, np.float64)
    for k in range(L):
        a, b = (np.asarray(lora[n][k], np.float64) for n in "ab")
        h = np.tanh(h @ (np.asarray(params["kernel"][k]) + 1.5 * a @ b) + bias[k])
    np.testing.assert_allclose(jl.lift(model)(params, moved, x), h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model(jl.merge(params, moved), x), h, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_bias_is_that_of_the_model():
    params, x = case()
    adapter = jl.init(jax.random.key(0), model, params, x, methods={"bias": jl.BitFit()})
    tuned = jl.lift(model)
    got = jax.grad(lambda t: tuned(params, adapter.replace(trainable=t), x).sum())(
        adapter.trainable
    )
    want = jax.grad(lambda b: model({**params, "bias": b}, x).sum())(params["bias"])
    np.testing.assert_allclose(got["bias"]["v"], want, rtol=1e-4, atol=1e-6)


def test_a_matrix_is_refused_by_its_path():
    params, x = case()
    with pytest.raises(ValueError, match=r"kernel: BitFit trains vectors; got a matrix \[4, 4\]"):
        jl.init(jax.random.key(0), model, params, x, methods={"kernel": jl.BitFit()})


class Scaled(jl.BitFit):
    """The mutation: not the bias that was trained."""

    def merge(self, w, p):
        return 1.1 * p["v"][None, :]


def test_mutation_another_bias_is_seen():
    params, x = case()
    adapter = jl.init(jax.random.key(0), model, params, x, methods={"bias": Scaled()})
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(jl.lift(model)(params, adapter, x), model(params, x), rtol=1e-3)
