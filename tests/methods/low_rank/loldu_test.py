"""LoLDU: the factors against SciPy, the trained pivots, a weight without a pivot."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jlora.methods import LoLDU
from jlora.methods.low_rank.loldu import ldu


def by_scipy(w):
    """u [d_in, k], d [k], v [k, d_out] of w, in float64."""
    lower, upper = scipy.linalg.lu(w.T, permute_l=True)
    d = np.diag(upper).copy()
    return (upper / d[:, None]).T, d, lower.T


def check_value(bench):
    adapter = bench.noisy(LoLDU(rank=3, alpha=6.0))
    u, d, v = by_scipy(bench.w)
    z = np.asarray(adapter.trainable["w"]["z"], np.float64)
    bench.agree(adapter, bench.w + 2.0 * (u[:, :3] * (z - d[:3])) @ v[:3], 1e-4)


def test_value(bench):
    check_value(bench)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (6, 6)])
def test_factors_are_scipys(shape):
    w = np.random.default_rng(0).normal(size=shape)
    for found, want in zip(ldu(jnp.asarray(w, jnp.float32)), by_scipy(w), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_limit_all_pivots_at_zero_leave_nothing(bench):
    adapter = bench.fresh(LoLDU(rank=8, alpha=8.0))
    assert {k: v.shape for k, v in adapter.trainable["w"].items()} == {"z": (8,)}
    bench.agree(adapter.replace(trainable={"w": {"z": jnp.zeros(8)}}), 0 * bench.w, 5e-5)


def test_a_weight_that_lacks_directions_gives_finite_factors():
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(8, 2)) @ rng.normal(size=(2, 6)), jnp.float32)
    u, d, v = ldu(w)
    assert np.isfinite(np.concatenate([np.ravel(x) for x in (u, d, v)])).all()
    assert float(jnp.abs(u).max()) < 1e3
    np.testing.assert_allclose((u * d[None, :]) @ v, w, atol=1e-5)
    u, d, v = ldu(jnp.zeros((4, 4)))
    np.testing.assert_array_equal((u * d[None, :]) @ v, jnp.zeros((4, 4)))


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"LoLDU\.rank: got 0, expected an integer of at least 1"):
        LoLDU(rank=0)
    with pytest.raises(ValueError, match="w: LoLDU rank: got 9, expected at most 8"):
        bench.fresh(LoLDU(rank=9))


def test_mutation_pivots_that_are_not_taken_off_are_seen(bench, monkeypatch):
    good = LoLDU.factors
    monkeypatch.setattr(LoLDU, "factors", lambda self, p: good(self, p | {"d": 0 * p["d"]}))
    with pytest.raises(AssertionError):
        check_value(bench)
