"""The Karcher mean: its iteration by numpy, and the equation it solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.exact.karcher import karcher
from jlora.merging.exact.slerp import multislerp

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


@pytest.mark.parametrize("steps", [2, 5])
def test_value_by_numpy(steps, make, dense):
    """exp of the mean of logs, from the direction of the mean of directions."""
    bank = make()
    y = dense(bank).reshape(3, -1)
    norms = np.linalg.norm(y, axis=1, keepdims=True)
    unit = y / norms
    m = W @ unit / np.linalg.norm(W @ unit)
    for _ in range(steps):
        cos = unit @ m
        gap = unit - cos[:, None] * m
        log = W @ (np.arccos(cos)[:, None] * gap / np.linalg.norm(gap, axis=1, keepdims=True))
        size = np.linalg.norm(log)
        m = np.cos(size) * m + np.sin(size) * log / size
    got = dense(karcher(bank, jnp.asarray(W, jnp.float32), steps=steps))
    np.testing.assert_allclose(got.ravel(), W @ norms * m, atol=1e-5)


def test_its_squared_angles_are_the_least(make, dense):
    """What it is for: closer to all in angle than the mean, than one step, than its neighbours."""
    bank, w = make(seed=4), jnp.asarray(W, jnp.float32)
    y = dense(bank).reshape(3, -1)

    def far(m):
        m = m.ravel()
        return W @ np.arccos(y @ m / np.linalg.norm(y, axis=1) / np.linalg.norm(m)) ** 2

    best = dense(karcher(bank, w, steps=30))
    near = best + 0.05 * np.random.default_rng(0).normal(size=(20, *best.shape))
    assert all(far(best) < far(m) for m in [*near, dense(multislerp(bank, w)), W @ y])


def test_mutation_one_step_is_not_stationary(make, dense):
    with pytest.raises(AssertionError):
        check(multislerp, make, dense)


def test_one_step_is_multislerp(make, dense):
    bank, w = make(), jnp.asarray(W, jnp.float32)
    got, want = dense(karcher(bank, w, steps=1)), dense(multislerp(bank, w))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("function", [karcher, multislerp])
def test_zero_adapters_are_left_out_and_alone_give_zero(function, make, dense):
    """One of three, all of three, a single one; and weights that are all zero."""
    bank, w = make(), jnp.asarray(W, jnp.float32)
    part = LowRank(bank.u.at[0].set(0.0), bank.v)
    rest = LowRank(bank.u[1:], bank.v[1:])
    got, want = dense(function(part, w)), dense(function(rest, w[1:]))
    np.testing.assert_allclose(got, want, atol=1e-5)
    for n in (1, 3):
        nothing = LowRank(jnp.zeros_like(bank.u[:n]), bank.v[:n])
        assert np.abs(dense(function(nothing, w[:n]))).max() == 0
    assert np.abs(dense(function(bank, jnp.zeros(3)))).max() == 0

    def loss(b):
        low = function(b, w)
        return jnp.sum((low.u @ low.v) ** 2)

    slopes = jax.grad(loss)(LowRank(jnp.zeros_like(bank.u), bank.v))
    assert all(bool(jnp.isfinite(t).all()) for t in slopes)


@pytest.mark.parametrize("function", [karcher, multislerp])
def test_negative_weights_subtract(function, make, dense):
    """-1 of one is minus it; of several, the mean with that adapter turned; never larger."""
    bank, w = make(), jnp.asarray([0.5, -0.3, 0.2], jnp.float32)
    one = LowRank(bank.u[:1], bank.v[:1])
    np.testing.assert_allclose(dense(function(one, -jnp.ones(1))), -dense(bank)[0], atol=1e-5)
    turned = LowRank(bank.u.at[1].multiply(-1.0), bank.v)
    got = dense(function(bank, w))
    np.testing.assert_allclose(got, dense(function(turned, jnp.abs(w))), atol=1e-5)
    assert np.linalg.norm(got) <= np.linalg.norm(dense(bank), axis=(1, 2)).max() * (1 + 1e-5)


def test_bad_steps(make):
    with pytest.raises(ValueError, match="steps: got 0"):
        karcher(make(), jnp.ones(3), steps=0)


def test_directions_that_cancel_have_no_mean(make):
    """Exactly opposite ones of other lengths: rounding would be taken for a direction."""
    u, v = make(seed=5)
    bank = LowRank(jnp.stack([u[0], -0.999 * u[0]]), jnp.stack([v[0], v[0]]))
    for function in (karcher, multislerp):
        out = function(bank, jnp.ones(2))
        assert not np.isfinite(np.asarray(out.u @ out.v)).any()
