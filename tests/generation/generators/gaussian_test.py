"""The Gaussian against joint moments in float64: mean, covariance, limits of the penalty."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator
from jlora.generation.generators import gaussian
from jlora.generation.generators.gaussian import GaussianConfig

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def at():
    return generator.world(jl.LoRA(2, alpha=3.0, freeze_a=True))


def fitted(at, **changes):
    config = GaussianConfig(**{"components": 7, **changes})
    return gaussian.fit(KEY, at.conditions, at.groups, at.bank, config)


@pytest.fixture(scope="module")
def state(at):
    return fitted(at, temperature=0.0)


def bank_of(at):
    return np.concatenate([np.asarray(t, "f8").reshape(8, -1)
                           for t in jax.tree.leaves(at.bank.trainable)], 1)  # fmt: skip


def one_of(adapter):
    return np.concatenate([np.asarray(t, "f8").ravel() for t in jax.tree.leaves(adapter.trainable)])


def moments(at, penalty):
    """(mean of the numbers at query 0, covariance), from the joint moments of both."""
    x, c = bank_of(at), np.asarray(at.conditions, "f8")
    size = np.sqrt(((c - c.mean(0)) ** 2).sum(1).mean())
    given, query = (c - c.mean(0)) / size, (np.asarray(at.queries[0], "f8") - c.mean(0)) / size
    centred, n = x - x.mean(0), len(x)
    inner = given.T @ given / n + penalty * np.eye(given.shape[1])  # primal: [E, E]
    cross = centred.T @ given / n
    mean = x.mean(0) + cross @ np.linalg.solve(inner, query)
    return mean, centred.T @ centred / n - cross @ np.linalg.solve(inner, cross.T)


def test_the_mean_is_that_of_a_joint_gaussian(at, state):
    made = gaussian.generate(KEY, state, at.queries[0])
    want, _ = moments(at, 0.1)
    np.testing.assert_allclose(one_of(made), want, atol=3e-5)
    for path, leaves in made.frozen.items():
        np.testing.assert_array_equal(leaves["a"], at.bank.frozen[path]["a"][0])
    # Mutation: another penalty is another regression.
    assert np.abs(one_of(made) - moments(at, 0.05)[0]).max() > 1e-3


def test_the_spread_is_what_the_condition_does_not_explain(at):
    hot = fitted(at)
    many = jax.jit(jax.vmap(gaussian.generate, (0, None, None)))
    samples = np.concatenate([np.asarray(t, "f8").reshape(4000, -1) for t in jax.tree.leaves(
        many(jax.random.split(KEY, 4000), hot, at.queries[0]).trainable)], 1)  # fmt: skip
    mean, covariance = moments(at, 0.1)
    scale = np.sqrt(np.trace(covariance))
    assert np.linalg.norm(samples.mean(0) - mean) < 0.05 * scale
    found = np.cov(samples.T, bias=True)
    assert np.linalg.norm(found - covariance) < 0.1 * np.linalg.norm(covariance)
    assert np.linalg.norm(found - moments(at, 3.0)[1]) > 0.2 * np.linalg.norm(covariance)


def test_without_a_penalty_a_task_gets_its_soup_and_with_a_large_one_the_mean_of_all(at):
    x = bank_of(at)
    sharp = gaussian.generate(KEY, fitted(at, penalty=1e-6, temperature=0.0), at.conditions[2])
    np.testing.assert_allclose(one_of(sharp), (x[2] + x[3]) / 2, atol=2e-2)
    blind = gaussian.generate(KEY, fitted(at, penalty=1e6, temperature=0.0), at.conditions[2])
    np.testing.assert_allclose(one_of(blind), x.mean(0), atol=1e-4)


def test_what_cannot_be_learned_from_is_an_error(at):
    with pytest.raises(ValueError, match="all conditions are equal"):
        gaussian.fit(KEY, jnp.ones_like(at.conditions), at.groups, at.bank)
    bad = at.conditions.at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="conditions: got numbers that are not finite"):
        gaussian.fit(KEY, bad, at.groups, at.bank)
    for changes in ({"penalty": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="expected a penalty above 0"):
            fitted(at, **changes)
    loose = at.bank.replace(frozen=jax.tree.map(lambda t: t.at[1].add(1.0), at.bank.frozen))
    with pytest.raises(ValueError, match="of adapter 1 differs from adapter 0"):
        gaussian.fit(KEY, at.conditions, at.groups, loose)
    assert dataclasses.asdict(GaussianConfig())["temperature"] == 1.0
