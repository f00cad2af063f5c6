"""The Karcher mean: its iteration by numpy, and the equation it solves."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.merging.karcher import karcher
from jlora.merging.slerp import multislerp

W = np.array([0.5, 0.3, 0.2])


def residual(m, y):
    """|sum_n alpha_n log_m| at the direction of m: zero at a Karcher mean."""
    unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    m = m / np.linalg.norm(m)
    cos = unit @ m
    gap = unit - cos[:, None] * m
    log = gap / np.linalg.norm(gap, axis=1, keepdims=True) * np.arccos(cos)[:, None]
    return np.linalg.norm(W @ log)


def check(function, make, dense):
    bank = make()
    y = dense(bank).reshape(3, -1)
    m = dense(function(bank, jnp.asarray(W, jnp.float32))).ravel()
    assert residual(m, y) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(m), W @ np.linalg.norm(y, axis=1), rtol=1e-5)


def test_it_is_stationary_and_of_mean_norm(make, dense):
    check(lambda b, w: karcher(b, w, steps=30), make, dense)


def test_mutation_one_step_is_not_stationary(make, dense):
    with pytest.raises(AssertionError):
        check(multislerp, make, dense)


def test_one_step_is_multislerp(make, dense):
    bank, w = make(), jnp.asarray(W, jnp.float32)
    got, want = dense(karcher(bank, w, steps=1)), dense(multislerp(bank, w))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_bad_steps(make):
    with pytest.raises(ValueError, match="steps: got 0"):
        karcher(make(), jnp.ones(3), steps=0)
