"""Sign conflicts, cancellation and subspace overlap against dense numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging import overlap, sign_conflict


def stacked(make):
    """A bank of one plain and one stacked site."""
    a, b = make(seed=1), make(seed=2)
    both = LowRank(*(jnp.stack([x, y], axis=1) for x, y in zip(a, b, strict=True)))
    return {"one": make(seed=3), "two": both}


def check(function, make, dense, block):
    bank = stacked(make)
    for path, got in function(bank, block=block).items():
        d = dense(bank[path])
        n = len(d)
        d = d.reshape(n, -1, *d.shape[-2:])
        for s in range(d.shape[1]):
            pairs = np.reshape(got.pairs, (-1, n, n))[s]
            cancelled = np.ravel(got.cancelled)[s]
            for i in range(n):
                for j in range(n):
                    want = (d[i, s] * d[j, s] < 0).mean() if i != j else 0.0
                    np.testing.assert_allclose(pairs[i, j], want, atol=1e-6)
            want = 1 - np.abs(d[:, s].sum(0)).sum() / np.abs(d[:, s]).sum()
            np.testing.assert_allclose(cancelled, want, atol=1e-5)


@pytest.mark.parametrize("block", [3, 8, 64])
def test_signs_by_numpy(block, make, dense):
    check(sign_conflict, make, dense, block)


def test_mutation_factors_are_not_deltas(make, dense):
    def wrong(bank, block):
        return sign_conflict({p: LowRank(abs(d.u), d.v) for p, d in bank.items()}, block=block)

    with pytest.raises(AssertionError):
        check(wrong, make, dense, 8)


def test_landmarks(make):
    """Equal, opposite and zero adapters."""
    one = make(n=0)
    bank = {"x": LowRank(jnp.stack([one.u, one.u, -one.u, 0 * one.u]), jnp.stack([one.v] * 4))}
    got = sign_conflict(bank)["x"]
    want = np.zeros((4, 4))
    want[2, :2] = want[:2, 2] = 1
    np.testing.assert_allclose(got.pairs, want, atol=1e-6)
    np.testing.assert_allclose(got.cancelled, 2 / 3, rtol=1e-5)
    zero = {"x": LowRank(0 * one.u[None], one.v[None])}
    assert float(sign_conflict(zero)["x"].cancelled) == 0
    share = overlap(bank)["x"]
    want = np.ones((4, 4))
    want[3], want[:, 3] = 0, 0
    np.testing.assert_allclose(share.inputs, want, atol=1e-5)


def test_overlap_by_numpy(make, dense):
    bank = stacked(make)
    bank["one"] = LowRank(bank["one"].u.at[1, :, 1].set(0.0), bank["one"].v)  # rank 1 of 2
    for path, got in overlap(bank).items():
        d = dense(bank[path])
        d = d.reshape(3, -1, *d.shape[-2:])
        for s in range(d.shape[1]):
            ranks = [1 if (path, n) == ("one", 1) else 2 for n in range(3)]
            svds = [np.linalg.svd(d[n, s]) for n in range(3)]
            for i in range(3):
                for j in range(3):
                    ri, rj = ranks[i], ranks[j]
                    x = svds[i][0][:, :ri].T @ svds[j][0][:, :rj]
                    y = svds[i][2][:ri] @ svds[j][2][:rj].T
                    at = np.reshape(got.inputs, (-1, 3, 3))[s, i, j]
                    np.testing.assert_allclose(at, (x**2).sum() / min(ri, rj), atol=1e-4)
                    at = np.reshape(got.outputs, (-1, 3, 3))[s, i, j]
                    np.testing.assert_allclose(at, (y**2).sum() / min(ri, rj), atol=1e-4)


def test_bad_block(make):
    with pytest.raises(ValueError, match="block: got 0"):
        sign_conflict({"x": make()}, block=0)
