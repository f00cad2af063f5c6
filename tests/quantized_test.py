"""Quantised leaves: codes by numpy, error bound, and lifting on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(3, 8, 8)), jnp.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_values_by_numpy(bits):
    q = jl.quantize(W, bits, block=4)
    blocks = np.asarray(W).reshape(3, 8, 2, 4)
    scale = np.abs(blocks).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    expected = (np.round(blocks / scale) * scale).reshape(3, 8, 8)
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6, atol=1e-7)
    assert np.abs(expected - W).max() <= scale.max() / 2 + 1e-6
    assert q.shape == W.shape and q.dtype == W.dtype and q.ndim == 3
    assert q.codes.size * q.codes.dtype.itemsize == W.size * bits // 8


def test_zero_block_and_bad_arguments():
    assert float(jnp.abs(jl.quantize(jnp.zeros((2, 4)), 4, 4).dequantize()).max()) == 0
    with pytest.raises(ValueError, match="bits: got 3"):
        jl.quantize(W, 3)
    with pytest.raises(ValueError, match="block: got 5, expected an even divisor of 8"):
        jl.quantize(W, 8, 5)


CASES = {
    "scan": lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0],
    "unrolled, transposed": lambda p, x: jnp.tanh(x @ p["w"][0].T) @ p["w"][2].T,
    "experts": lambda p, x: jnp.einsum("td,edf->etf", x, p["w"]),
    "stack last": lambda p, x: lax.map(lambda w: x[:, :3] @ w, jnp.moveaxis(p["w"], 2, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_lift(name):
    fn, x = CASES[name], W[0, :2]
    params = {"w": jl.quantize(W, 8 if name == "scan" else 4, block=4)}
    a = jl.init(jax.random.key(0), fn, params, x, methods={"w": jl.LoRA(2)})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))
    dense = {"w": params["w"].dequantize()}
    tuned = jax.jit(jl.lift(fn))
    np.testing.assert_allclose(tuned(params, {}, x), fn(dense, x), rtol=1e-5, atol=1e-6)
    expected = fn(jl.merge(params, a), x)
    np.testing.assert_allclose(tuned(params, a, x), expected, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(expected - fn(dense, x)).max()) > 1e-3


def test_only_one_layer_at_a_time_is_dense():
    params = {"w": jl.quantize(W, 4, block=4)}
    jaxpr = jax.make_jaxpr(lambda p, x: jl.lift(CASES["scan"])(p, {}, x))(params, W[0])
    outside = [
        v.aval.shape for e in jaxpr.jaxpr.eqns for v in e.outvars if v.aval.dtype == jnp.float32
    ]
    assert (3, 8, 8) not in outside
