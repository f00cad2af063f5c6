"""Breadcrumbs by numpy, limits, the paper's claim, a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.breadcrumbs import (
    banded,
    breadcrumbs,
    breadcrumbs_rule,
    breadcrumbs_ties,
    breadcrumbs_ties_rule,
)
from jlora.merging.engine import streamed, threshold

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(3, 18, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(3, 2, 14)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, 0.3, 0.2])
WJ = jnp.asarray(W, jnp.float32)


def band(density, gamma):
    """Sort, cut off both ends."""
    size = DENSE[0].size
    top, k = int(gamma * size), int(density * size)
    top = min(top, size - k)
    out = np.zeros_like(DENSE)
    for n in range(3):
        order = np.argsort(-np.abs(DENSE[n]).ravel())[top : top + k]
        out[n].ravel()[order] = DENSE[n].ravel()[order]
    return out


def check(density=0.5, gamma=0.1):
    options = {"density": density, "gamma": gamma, "scale": 0.5}
    run = jax.jit(lambda b: streamed.dense(b, breadcrumbs_rule(b, WJ, **options)))
    expected = 0.5 * np.einsum("n,nio->io", W, band(density, gamma))
    np.testing.assert_allclose(run(BANK), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density, gamma", [(0.5, 0.1), (0.9, 0.0), (0.95, 0.2)])
def test_value(density, gamma):
    check(density, gamma)


def test_ties_value():
    y = W[:, None, None] * band(0.5, 0.1)
    agree = np.sign(y) == np.where(y.sum(0) >= 0, 1, -1)
    share = (W[:, None, None] * agree).sum(0)
    expected = (y * agree).sum(0) / np.where(share == 0, 1, share)
    run = jax.jit(lambda b: streamed.dense(b, breadcrumbs_ties_rule(b, WJ, density=0.5, gamma=0.1)))
    np.testing.assert_allclose(run(BANK), expected, rtol=1e-4, atol=1e-5)
    low = jax.jit(lambda b: breadcrumbs_ties(b, WJ, density=0.5, gamma=0.1, rank=14))(BANK)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-3)


def test_density_one_is_task_arithmetic():
    low = jax.jit(lambda b: breadcrumbs(b, WJ, density=1.0))(BANK)
    expected = np.einsum("n,nio->io", W, DENSE)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-4)


def test_density_one_is_the_vote_of_all():
    low = jax.jit(lambda b: breadcrumbs_ties(b, WJ, density=1.0, rank=14))(BANK)
    y = W[:, None, None] * DENSE
    agree = np.sign(y) == np.sign(y.sum(0))
    expected = (y * agree).sum(0) / (W[:, None, None] * agree).sum(0)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-3)


def test_claim_outliers_of_one_task_do_not_drown_the_others():
    """A few huge entries of one delta: the masked sum is closer to the sum of clean deltas."""
    clean = RNG.normal(size=(3, 20, 20))
    dirty = clean.copy()
    at = RNG.choice(400, 4, replace=False)
    dirty[0].ravel()[at] += 40.0
    bank = LowRank(jnp.asarray(dirty, jnp.float32), jnp.stack([jnp.eye(20)] * 3))
    merged = streamed.dense(bank, breadcrumbs_rule(bank, jnp.ones(3), density=0.85, gamma=0.01))
    wanted = clean.sum(0)
    assert np.linalg.norm(merged - wanted) < 0.3 * np.linalg.norm(dirty.sum(0) - wanted)


def test_mutation_outliers_stay(monkeypatch):
    real = threshold.kth_largest
    monkeypatch.setattr(threshold, "kth_largest", lambda *a, **k: real(*a, **k) * 0.9)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("bad", [{"gamma": 1.0}, {"gamma": -0.1}, {"density": 0.0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        banded(BANK, **{"density": 0.5, "gamma": 0.1, **bad})
