"""The exact weighted sum."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.core.algebra import LowRank
from jlora.merging.concat import concat, concat_error

W = jnp.asarray([0.5, -1.0, 2.0])


def check(function, make, dense):
    bank = make()
    want = np.einsum("n,nio->io", np.asarray(W), dense(bank))
    np.testing.assert_allclose(dense(function(bank, W)), want, atol=1e-5)


def test_value_by_numpy(make, dense):
    check(concat, make, dense)
    assert concat(make(), W).u.shape == (8, 6) and float(concat_error(make(), W)) == 0


def test_mutation_a_sum_of_factors_is_no_sum(make, dense):
    """What a merge of factors does: cross terms."""

    def wrong(bank, w):
        return LowRank(jnp.einsum("n,nir->ir", w, bank.u), jnp.sum(bank.v, axis=0))

    with pytest.raises(AssertionError):
        check(wrong, make, dense)
