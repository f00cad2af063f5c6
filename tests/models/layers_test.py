"""Hand-written tangent rules against numpy, against automatic differentiation, and by size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import layers

EPS = 1e-5


def _data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _plain_gelu(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x / math.sqrt(2.0)))


def _plain_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    scale, bias = (v.reshape((1,) * (x.ndim - 1) + (-1,)) for v in (scale, bias))
    return (x - mean) / jnp.sqrt(variance + EPS) * scale + bias


def _norm(x, scale, bias):
    return layers.layer_norm(x, scale, bias, EPS)


def _plain_softmax(x):
    powers = jnp.exp(x)
    return powers / powers.sum(-1, keepdims=True)


CASES = {
    "gelu": (layers.gelu, _plain_gelu, (_data(3, 5),)),
    "norm": (_norm, _plain_norm, (_data(2, 3, 5), _data(5, seed=1), _data(5, seed=2))),
    "softmax": (layers.softmax, _plain_softmax, (_data(3, 5),)),
}


def _derivatives(f, args, seed=7):
    """Value, jvp, vjp, and the derivative of a scalar of the gradient (second order)."""
    tangents = tuple(_data(*a.shape, seed=seed + i) for i, a in enumerate(args))
    every = tuple(range(len(args)))

    def scalar(*args):
        y = f(*args)
        return jnp.sum(y * _data(*y.shape, seed=3))

    def through_gradient(*args):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(scalar, every)(*args))

    value, tangent = jax.jvp(f, args, tangents)
    return value, tangent, jax.grad(scalar, every)(*args), jax.grad(through_gradient, every)(*args)


def _worst(a, b):
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_all_derivatives_agree_with_autodiff(name):
    ours, plain, args = CASES[name]
    got = jax.jit(lambda *a: _derivatives(ours, a))(*args)
    want = jax.jit(lambda *a: _derivatives(plain, a))(*args)
    assert _worst(got, want) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_vmap_of_derivatives_is_a_loop(name):
    ours, _, args = CASES[name]
    many = tuple(jnp.stack([a, a * 0.5 + 0.1, -a]) for a in args)
    one = jax.jit(lambda *a: _derivatives(ours, a))
    got = jax.jit(jax.vmap(lambda *a: _derivatives(ours, a)))(*many)
    for i in range(3):
        want = one(*(a[i] for a in many))
        assert _worst(jax.tree.map(lambda x, i=i: x[i], got), want) < 1e-5


def test_derivative_check_sees_a_wrong_rule():
    @jax.custom_jvp
    def wrong(x):
        return layers.gelu(x)

    # The factor x of the density is lost: value right, derivative wrong.
    @wrong.defjvp
    def _(primals, tangents):
        x = primals[0]
        density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return layers.gelu(x), (0.5 + 0.5 * jax.lax.erf(x / math.sqrt(2)) + density) * tangents[0]

    args = (_data(3, 5),)
    got, want = (jax.jit(lambda x, f=f: _derivatives(f, (x,)))(*args) for f in (wrong, _plain_gelu))
    assert _worst(got[0], want[0]) < 1e-6
    assert _worst(got[2], want[2]) > 1e-2


def test_gelu_value_and_limits():
    x = np.linspace(-4, 4, 17)
    want = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x, jnp.float32)), want, atol=1e-6)
    far = jnp.array([-30.0, 30.0])
    np.testing.assert_array_equal(layers.gelu(far), [0.0, 30.0])
    np.testing.assert_array_equal(jax.vmap(jax.grad(layers.gelu))(far), [0.0, 1.0])


def test_norm_value_and_laws():
    x, scale, bias = CASES["norm"][2]
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    want = want * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(_norm(x, scale, bias), want, atol=2e-6)
    moved = layers.layer_norm(3.0 * x + 2.0, scale, bias, 0.0)
    np.testing.assert_allclose(moved, layers.layer_norm(x, scale, bias, 0.0), atol=1e-5)
    flat = _norm(jnp.full((1, 5), 7.0), scale, bias)
    np.testing.assert_array_equal(flat[0], bias)


def test_low_precision_keeps_its_dtype():
    x = _data(2, 5).astype(jnp.bfloat16)
    ones, zeros = jnp.ones(5), jnp.zeros(5)
    y, back = jax.vjp(lambda x: _norm(x, ones, zeros), x)
    assert y.dtype == jnp.bfloat16 and back(y)[0].dtype == jnp.bfloat16
    assert jax.eval_shape(layers.gelu, x).dtype == jnp.bfloat16
    # Statistics are taken in float32: only the rounding of the result is left.
    np.testing.assert_allclose(
        y.astype(jnp.float32), _plain_norm(x.astype(jnp.float32), ones, zeros), rtol=2**-8
    )


def _kept(f, *args):
    """Numbers kept between the forward and the backward pass (an array used twice counts once)."""
    traced = jax.make_jaxpr(lambda *args: jax.vjp(f, *args)[1])(*args)
    distinct = {id(var): var.aval.shape for var in traced.jaxpr.outvars}
    return sum(math.prod(shape) for shape in distinct.values())


def test_residuals_are_the_least():
    x = _data(4, 6, 8)
    scale, bias = jnp.ones(8), jnp.zeros(8)
    assert _kept(layers.gelu, x) == x.size
    assert _kept(layers.softmax, x) == x.size
    assert _kept(lambda x: _norm(x, scale, bias), x) <= x.size + 4 * 6 + 8 + 8
    # The same count on the plain functions shows that it would notice.
    assert _kept(_plain_gelu, x) > x.size and _kept(_plain_softmax, x) > x.size
    assert _kept(lambda x: _plain_norm(x, scale, bias), x) > x.size + 4 * 6 + 8 + 8


def test_frozen_norm_emits_no_reduction_over_rows():
    x, scale, bias = _data(4, 8), jnp.ones(8), jnp.zeros(8)

    def row_reductions(argnums):
        grad = jax.grad(lambda *a: _norm(*a).sum(), argnums)
        return str(jax.make_jaxpr(grad)(x, scale, bias)).count("reduce_sum[axes=(0,)")

    assert row_reductions(0) == 0
    assert row_reductions((0, 1, 2)) == 2


def _numpy_attention(q, k, v, bias, heads):
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    b, _, d = q.shape
    out, h = np.zeros_like(q), d // heads
    for row in range(b):
        for head in range(heads):
            cut = slice(head * h, (head + 1) * h)
            logits = q[row, :, cut] @ k[row, :, cut].T / math.sqrt(h) + bias[row]
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[row, :, cut] = weights / weights.sum(-1, keepdims=True) @ v[row, :, cut]
    return out


def test_attention_value_mask_and_permutation():
    q, k, v = (_data(3, 5, 8, seed=i) for i in range(3))
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    bias = layers.mask_bias(mask)
    run = jax.jit(lambda k, v, bias: layers.attention(q, k, v, bias, 2))
    got = run(k, v, bias)
    np.testing.assert_allclose(got, _numpy_attention(q, k, v, bias, 2), atol=2e-6)
    # A row without keys is the plain mean of the values: finite, never NaN.
    np.testing.assert_allclose(got[2], jnp.tile(v[2].mean(0), (5, 1)), atol=1e-6)
    # What is hidden has no influence, and the order of the keys none either.
    hidden = jnp.where(mask[..., None], 0.0, 100.0)
    np.testing.assert_allclose(run(k + hidden, v + hidden, bias)[:2], got[:2], atol=1e-6)
    order = jnp.asarray([3, 0, 4, 1, 2])
    np.testing.assert_allclose(run(k[:, order], v[:, order], bias[:, order]), got, atol=1e-6)
    assert float(jnp.abs(run(k, v, jnp.zeros((3, 5)))[1] - got[1]).max()) > 1e-2
