"""KnOTS by numpy on dense deltas."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.spectral.knots import knots

W = np.array([0.5, 0.3, 0.2])
W32 = jnp.asarray(W, jnp.float32)


def ties(x, w, density):
    kept = np.zeros_like(x)
    for n, t in enumerate(x):
        order = np.argsort(-np.abs(t).ravel())[: max(1, round(density * t.size))]
        kept[n].flat[order] = t.flat[order]
    w = w[:, None, None]
    sign = np.where((w * kept).sum(0) >= 0, 1, -1)
    agree = w * (kept * sign > 0)
    total = agree.sum(0)
    return np.where(total != 0, (agree * kept).sum(0) / np.where(total != 0, total, 1), 0)


def check(function, make, dense):
    bank = make(d_in=7, d_out=9)
    deltas = dense(bank)
    y = np.linalg.svd(deltas.reshape(-1, 9), full_matrices=False)[2][:6]
    want = ties(deltas @ y.T, W, 0.4) @ y
    np.testing.assert_allclose(dense(function(bank, W32, density=0.4)), want, atol=1e-4)


def test_value_by_numpy(make, dense):
    check(knots, make, dense)


def test_mutation_the_sum_is_another_merge(make, dense):
    with pytest.raises(AssertionError):
        check(lambda b, w, density: knots(b, w, rule="sum"), make, dense)


def test_the_sum_rule_is_the_exact_sum(make, dense):
    bank = make()
    want = np.einsum("n,nio->io", W, dense(bank))
    np.testing.assert_allclose(dense(knots(bank, W32, rule="sum")), want, atol=1e-5)
    np.testing.assert_allclose(dense(knots(bank, W32, rule="sum", scale=2.0)), 2 * want, atol=1e-5)


def test_with_nothing_trimmed_it_is_idempotent(make, dense):
    bank = make()
    same = LowRank(*(jnp.stack([t[0]] * 3) for t in bank))
    np.testing.assert_allclose(dense(knots(same, W32, density=1.0)), dense(bank)[0], atol=1e-5)


def test_directions_not_coordinates(make, dense):
    """The claim in small: two adapters with disjoint outputs do not disturb each other."""
    bank = make(n=2, r=1)
    v = jnp.asarray(np.eye(6)[:2, None], jnp.float32)
    bank = LowRank(bank.u, v)
    got = dense(knots(bank, jnp.asarray([0.5, 0.5]), density=1.0))
    np.testing.assert_allclose(got, dense(bank).sum(0), atol=1e-5)
