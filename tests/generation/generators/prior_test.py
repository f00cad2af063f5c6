"""The prior mean: kernel ridge on the soups, the mean of the soups without a condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.generators import prior


@pytest.fixture(scope="module")
def made():
    key = jax.random.split(jax.random.key(0), 2)
    cond = jax.random.normal(key[0], (6, 4, 3))
    values = jax.random.normal(key[1], (6, 2, 5)) + cond.sum((1, 2))[:, None, None]
    return cond, values, *prior.fit(cond, values, "ridge")


def oracle(choice, cond, values, query):
    """Ridge with an intercept by its normal equations, in numpy float64."""
    flat = np.asarray(cond, np.float64).reshape(len(cond), -1)
    z = np.asarray(values, np.float64).reshape(len(values), -1)
    kernel = lambda x, y: np.asarray(choice.kernel(jnp.asarray(x), jnp.asarray(y)), np.float64)  # noqa: E731
    flat32 = flat.astype(np.float32)
    inner, row = kernel(flat32, flat32), kernel(np.float32(query).reshape(1, -1), flat32)
    n = len(z)
    h = np.eye(n) - 1 / n
    alpha = np.linalg.solve(h @ inner @ h + choice.penalty * np.eye(n), h @ z)
    out = z.mean(0) + (row - inner.mean(1)[None]) @ h @ alpha
    return out.reshape(values.shape[1:])


def test_it_is_kernel_ridge_with_an_intercept(made):
    cond, values, fit, choice = made
    query = np.asarray(cond[3]) * 0.8 + 0.1
    got = prior.mean(fit, choice.kernel, jnp.asarray(query), False)
    want = oracle(choice, cond, values, query)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    wrong = oracle(choice._replace(penalty=choice.penalty * 30), cond, values, query)
    assert np.abs(np.asarray(got) - wrong).max() > 1e-2  # mutation: another penalty


def test_without_a_condition_it_is_the_mean_of_the_soups(made):
    cond, values, fit, choice = made
    got = prior.mean(fit, choice.kernel, cond[2], True)
    np.testing.assert_allclose(got, np.asarray(values).mean(0), rtol=1e-5, atol=1e-5)
    assert np.abs(prior.mean(fit, choice.kernel, cond[2], False) - got).max() > 1e-2


def test_prior_none_is_zero(made):
    cond, values, _, _ = made
    fit, choice = prior.fit(cond, values, "none")
    assert not np.asarray(prior.mean(fit, choice.kernel, cond[0], False)).any()
