"""TSV-Merge by numpy, as the official code does it on dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.exact.concat import concat
from jlora.merging.spectral.tsv import tsv

W = np.array([1.0, 0.5, 2.0])
W32 = jnp.asarray(W, jnp.float32)


def by_numpy(deltas, w, ranks):
    us, ss, vs = [], [], []
    for d, c, k in zip(deltas, w, np.broadcast_to(ranks, 3), strict=True):
        x, s, y = np.linalg.svd(d, full_matrices=False)
        us, ss, vs = [*us, x[:, :k]], [*ss, c * s[:k]], [*vs, y[:k]]
    polar = []
    for m in (np.concatenate(us, 1), np.concatenate(vs, 0)):
        p, _, q = np.linalg.svd(m, full_matrices=False)
        polar.append(p @ q)
    return polar[0] @ np.diag(np.concatenate(ss)) @ polar[1]


def check(function, make, dense, k=2):
    bank = make(d_in=9, d_out=8)
    got = dense(function(bank, W32, rank=k))
    np.testing.assert_allclose(got, by_numpy(dense(bank), W, k), atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_value_by_numpy(k, make, dense):
    check(tsv, make, dense, k)


def test_mutation_a_sum_is_not_orthogonal(make, dense):
    with pytest.raises(AssertionError):
        check(lambda b, w, rank: concat(b, w), make, dense)


def test_orthogonal_adapters_are_summed(make, dense):
    """The limit: nothing to make orthogonal."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 6)))[0].T.reshape(3, 2, 8)
    bank = LowRank(jnp.asarray(q.swapaxes(1, 2), jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(dense(tsv(bank, W32)), dense(concat(bank, W32)), atol=1e-5)


def test_interference_is_less_than_in_the_sum(make, dense):
    """The claim: in the sum, an adapter's directions carry what others add; here less so."""
    bank = make(d_in=9, d_out=8)
    deltas, one = dense(bank), jnp.ones(3)

    def interference(m):
        total = 0.0
        for d in deltas:
            x, s, y = np.linalg.svd(d)
            total += ((x[:, :2].T @ m @ y[:2].T - np.diag(s[:2])) ** 2).sum()
        return total

    assert interference(dense(tsv(bank, one))) < 0.8 * interference(dense(concat(bank, one)))


def test_gradient_by_differences_with_padded_ranks(make, dense):
    """A direction that is absent, as different ranks leave one, keeps the gradient right."""

    def absent(b):
        return LowRank(b.u.at[1, :, 1].set(0.0), b.v.at[1, 1].set(0.0))

    bank, step = (absent(make(seed=s, d_in=9, d_out=8)) for s in (0, 5))
    probe, dw = np.random.default_rng(3).normal(size=(9, 8)), np.array([0.3, -1.0, 0.5])

    def f(b, w):
        low = tsv(b, w)
        return jnp.sum(low.u @ low.v * jnp.asarray(probe, jnp.float32))

    got = jax.jvp(f, (bank, W32), (step, jnp.asarray(dw, jnp.float32)))[1]
    h, ends = 1e-4, []
    for sign in (h, -h):
        u, v = (np.float64(t) + sign * np.float64(d) for t, d in zip(bank, step, strict=True))
        ends.append((by_numpy(u @ v, W + sign * dw, [2, 1, 2]) * probe).sum())
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * h), rtol=5e-3)


def test_bad_rank(make):
    with pytest.raises(ValueError, match="rank: got 0"):
        tsv(make(), W32, rank=0)
