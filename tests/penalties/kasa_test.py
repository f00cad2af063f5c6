"""KaSA's penalty: its value by numpy, where it is zero, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods import KaSA
from jlora.penalties import kasa
from tests.penalties.orthogonality_test import RNG, noisy


def omega(a, d, b, beta: float = 1e-4, gamma: float = 1e-3):
    apart = sum(np.linalg.norm(g - np.eye(len(g)), "fro") for g in (a.T @ a, b @ b.T))
    return float(beta * np.square(d).sum() + gamma * apart)


def parts(adapter):
    return [np.asarray(adapter.trainable["w"][k], "f8") for k in "adb"]


def test_value_by_numpy():
    adapter = noisy(KaSA(rank=3))
    a, d, b = parts(adapter)
    assert float(kasa(adapter)) == pytest.approx(omega(a, d, b), rel=1e-5)
    want = omega(a, d, b, beta=2.0, gamma=0.5)
    assert float(kasa(adapter, beta=2.0, gamma=0.5)) == pytest.approx(want, rel=1e-5)


def test_a_stack_is_the_mean_of_its_layers():
    adapter = noisy(KaSA(rank=3), 2)
    a, d, b = parts(adapter)
    want = np.mean([omega(a[i], d[i], b[i]) for i in range(2)])
    assert float(kasa(adapter)) == pytest.approx(want, rel=1e-5)


def test_only_orthonormal_factors_without_singular_values_are_free():
    adapter = noisy(KaSA(rank=3))
    a, b = (np.linalg.qr(RNG.normal(size=(n, 3)))[0] for n in (12, 8))
    free = {"a": a, "d": np.zeros(3), "b": b.T}
    at = lambda p: adapter.replace(  # noqa: E731
        trainable={"w": {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}}
    )
    assert float(kasa(at(free))) < 1e-8
    assert float(kasa(at({**free, "d": np.ones(3)}))) == pytest.approx(3e-4, rel=1e-3)
    assert float(kasa(at({**free, "a": 2 * a}))) == pytest.approx(1e-3 * 3 * 3**0.5, rel=1e-3)
    assert float(kasa(noisy(jl.LoRA(2)))) == 0.0


def test_the_gradient_of_an_exactly_orthonormal_factor_is_finite():
    adapter = noisy(KaSA(rank=2))
    eye = {"a": jnp.eye(12, 2), "d": jnp.zeros(2), "b": jnp.eye(2, 8)}
    grads = jax.grad(lambda t: kasa(adapter.replace(trainable=t)))({"w": eye})
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: got -1"):
        kasa(noisy(KaSA(rank=2)), **{name: -1.0})
