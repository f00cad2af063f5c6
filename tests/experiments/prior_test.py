"""The prior mean: leave-one-out rows equal refits, the null condition is the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stages import prior
from jlora.generation import ridge


@pytest.fixture(scope="module")
def made():
    key = jax.random.split(jax.random.key(0), 2)
    cond = jax.random.normal(key[0], (6, 4, 3))
    values = jax.random.normal(key[1], (6, 2, 5)) + cond.sum((1, 2))[:, None, None]
    return cond, values, *prior.fit(cond, values, "ridge")


def refit(choice, cond, values, keep, query):
    """Prediction of a ridge fitted on `keep` alone, in numpy where it is only sums."""
    flat = cond.reshape(len(cond), -1)
    state = ridge.fit(choice.kernel, flat[keep], choice.penalty)
    weights = np.asarray(ridge.weights(choice.kernel, state, query.reshape(1, -1)))[0]
    return np.einsum("k,ksl->sl", weights, np.asarray(values)[keep])


@pytest.mark.parametrize("who", [0, 3, 6])
def test_rows_equal_refits_without_the_task(made, who):
    cond, values, fit, choice = made
    keep = np.asarray([i for i in range(6) if i != who])
    query = cond[who % 6] * 0.9
    got = prior.mean(fit, choice.kernel, query, jnp.int32(who), False)
    want = refit(choice, cond, values, keep, query)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    other = prior.mean(fit, choice.kernel, query, jnp.int32((who + 1) % 6), False)
    assert np.abs(np.asarray(other) - want).max() > 1e-3  # mutation: the wrong task left out


def test_without_a_condition_it_is_the_mean_of_the_other_tasks(made):
    cond, values, fit, choice = made
    got = prior.mean(fit, choice.kernel, cond[2], jnp.int32(2), True)
    keep = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(got, np.asarray(values)[keep].mean(0), rtol=1e-5, atol=1e-5)


def test_prior_none_is_zero(made):
    cond, values, _, _ = made
    fit, choice = prior.fit(cond, values, "none")
    assert not np.asarray(prior.mean(fit, choice.kernel, cond[0], jnp.int32(6), False)).any()
