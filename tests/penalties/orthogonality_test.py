"""AdaLoRA's penalty: its value by numpy, and where it is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.methods import AdaLoRA
from jlora.penalties import orthogonality

RNG = np.random.default_rng(0)


def leaf(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def noisy(method, *stack):
    """An adapter of one site, its trained arrays with noise."""
    shape = (*stack, 12, 8)
    site = jl.Site("w", shape, "sio"[-len(shape) :], np.dtype("float32"), ("dot",))
    fresh = initialise(jax.random.key(0), [(site, method)], {"w": leaf(*shape)})
    moved = jax.tree.map(lambda t: t + 0.3 * leaf(*t.shape), fresh.trainable)
    return fresh.replace(trainable=moved)


def omega(a, b):
    return sum(np.square(g - np.eye(len(g))).sum() for g in (a.T @ a, b @ b.T)) / 2


def test_value_by_numpy():
    adapter = noisy(AdaLoRA(rank=3))
    a, b = (np.asarray(adapter.trainable["w"][k], "f8") for k in ("a", "b"))
    assert float(orthogonality(adapter)) == pytest.approx(omega(a, b), rel=1e-5)


def test_every_layer_of_a_stack_counts():
    adapter = noisy(AdaLoRA(rank=3), 2)
    a, b = (np.asarray(adapter.trainable["w"][k], "f8") for k in ("a", "b"))
    want = (omega(a[0], b[0]) + omega(a[1], b[1])) / 2
    assert float(orthogonality(adapter)) == pytest.approx(want, rel=1e-5)


def test_zero_for_orthogonal_factors_and_for_other_methods():
    adapter = noisy(AdaLoRA(rank=3))
    a, b = (np.linalg.qr(RNG.normal(size=(n, 3)))[0] for n in (12, 8))
    parts = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b.T, jnp.float32)}
    even = adapter.replace(trainable={"w": {**adapter.trainable["w"], **parts}})
    assert float(orthogonality(even)) < 1e-10
    assert float(orthogonality(noisy(jl.LoRA(2)))) == 0.0


def test_half_precision_is_computed_in_float32():
    adapter = noisy(AdaLoRA(rank=3))
    half = adapter.replace(
        trainable=jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter.trainable)
    )
    a, b = (np.asarray(half.trainable["w"][k], "f8") for k in ("a", "b"))
    found = orthogonality(half)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(omega(a, b), rel=1e-5)
