"""The exact weighted sum."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.exact.concat import concat, concat_error

W = jnp.asarray([0.5, -1.0, 2.0])


def check(function, make, dense):
    bank = make()
    want = np.einsum("n,nio->io", np.asarray(W), dense(bank))
    np.testing.assert_allclose(dense(function(bank, W)), want, atol=1e-5)


def test_value_by_numpy(make, dense):
    check(concat, make, dense)
    assert concat(make(), W).u.shape == (8, 6) and float(concat_error(make(), W)) == 0


def test_limits(make, dense):
    """One adapter is itself; an adapter minus itself is nothing; all weights zero: nothing."""
    bank = make()
    one = LowRank(bank.u[:1], bank.v[:1])
    np.testing.assert_array_equal(concat(one, jnp.ones(1)).u, bank.u[0])
    twice = LowRank(*(jnp.stack([t[0], t[0]]) for t in bank))
    assert np.abs(dense(concat(twice, jnp.asarray([1.0, -1.0])))).max() < 1e-5
    assert np.abs(dense(concat(bank, jnp.zeros(3)))).max() == 0


def test_claim_skills_of_other_inputs_stay_whole(make, dense):
    """Two skills that read disjoint inputs keep all they do; averaged factors mix them."""
    bank, half = make(n=2), (np.arange(8) < 4).astype("f4")
    bank = LowRank(bank.u * jnp.asarray(np.stack([half, 1 - half]))[..., None], bank.v)
    merged = dense(concat(bank, jnp.ones(2)))
    mixed = np.asarray(bank.u.sum(0) @ bank.v.sum(0))
    for d, rows in zip(dense(bank), (slice(0, 4), slice(4, 8)), strict=True):
        np.testing.assert_allclose(merged[rows], d[rows], atol=1e-5)
        assert np.linalg.norm(mixed[rows] - d[rows]) > 0.3 * np.linalg.norm(d)


def test_mutation_a_sum_of_factors_is_no_sum(make, dense):
    """What a merge of factors does: cross terms."""

    def wrong(bank, w):
        return LowRank(jnp.einsum("n,nir->ir", w, bank.u), jnp.sum(bank.v, axis=0))

    with pytest.raises(AssertionError):
        check(wrong, make, dense)
