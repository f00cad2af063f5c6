"""Normalisers: numpy statistics, exact inverses, and the leak of per-task statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.tokens import normalise

N, T, D = 12, 4, 6
TYPES = np.array([0, 0, 1, 2])
TASKS = np.arange(N) % 3
MASK = np.arange(D)[None, :] < np.array([6, 6, 4, 5])[:, None]


def zoo(seed=0):
    rng = np.random.default_rng(seed)
    tasks = 5 * rng.normal(size=(3, T, D))
    x = tasks[TASKS] + rng.normal(size=(N, T, D)) * rng.uniform(0.1, 3, size=(T, D))
    return np.where(MASK, x, 0).astype("f4")


def fit(mode, x=None):
    more = {"site_rms": {"types": TYPES}, "coordinate": {}, "task": {"tasks": TASKS}}[mode]
    return normalise.fit(mode, jnp.asarray(zoo() if x is None else x), mask=MASK, **more)


def test_site_rms_against_numpy():
    x, norm = zoo().astype("f8"), fit("site_rms")
    mean = x.mean(0)
    for t in range(T):
        same = np.flatnonzero(TYPES == TYPES[t])
        values = np.concatenate([(x[:, u] - mean[u])[:, MASK[u]].ravel() for u in same])
        np.testing.assert_allclose(norm.scale[t, 0], np.sqrt(np.mean(values**2)), rtol=1e-5)
    np.testing.assert_allclose(norm.mean, mean, atol=1e-5)
    assert norm.scale[0, 0] == norm.scale[1, 0] != norm.scale[2, 0]


def test_coordinate_against_numpy():
    x, norm = zoo(), fit("coordinate")
    z = jax.vmap(lambda v: normalise.apply(norm, v))(jnp.asarray(x))
    expected = (x - x.mean(0)) / np.where(MASK, x.std(0), 1)
    np.testing.assert_allclose(z, expected, atol=2e-5)


def test_task_against_numpy_and_its_leak():
    """A zero latent decodes to the soup of the task whose statistics are used."""
    x, norm = zoo(), fit("task")
    for q in range(3):
        rows = x[TASKS == q]
        z = jax.vmap(lambda v, i: normalise.apply(norm, v, i))(
            jnp.asarray(rows), jnp.full(len(rows), q)
        )
        np.testing.assert_allclose(
            z, (rows - rows.mean(0)) / np.where(MASK, rows.std(0), 1), atol=5e-5
        )
        leaked = normalise.invert(norm, jnp.zeros((T, D)), q)
        np.testing.assert_allclose(leaked, rows.mean(0), atol=1e-5)
    # The same zero through global statistics is one adapter for all tasks.
    world = normalise.invert(fit("coordinate"), jnp.zeros((T, D)))
    np.testing.assert_allclose(world, x.mean(0), atol=1e-5)


@pytest.mark.parametrize("mode", normalise.MODES)
def test_invert_is_the_inverse(mode):
    norm, x = fit(mode), jnp.asarray(zoo()[5])
    task = int(TASKS[5]) if mode == "task" else None
    back = normalise.invert(norm, normalise.apply(norm, x, task), task)
    np.testing.assert_allclose(back, x, atol=1e-5)
    if mode == "task":  # mutation: the statistics of another task give another adapter
        wrong = normalise.invert(norm, normalise.apply(norm, x, task), (task + 1) % 3)
        assert np.abs(wrong - x).max() > 1


def test_held_out_adapters_do_not_enter():
    """The fit sees its argument only: other adapters are normalised with the same numbers."""
    norm = fit("site_rms")
    outlier = jnp.asarray(zoo()[0] + 100)
    assert np.abs(normalise.apply(norm, outlier)).max() > 10


@pytest.mark.parametrize("mode", normalise.MODES)
def test_constant_zoo(mode):
    x = np.broadcast_to(zoo()[:1], (N, T, D))
    norm, task = fit(mode, x), 0 if mode == "task" else None
    z = normalise.apply(norm, jnp.asarray(x[0]), task)
    assert np.abs(z).max() < 0.5  # rounding errors only
    moved = normalise.invert(norm, jnp.ones((T, D)), task) - x[0]
    assert np.abs(moved).max() < 1e-4
    empty = fit(mode, np.zeros_like(x))
    assert np.all(normalise.apply(empty, jnp.zeros((T, D)), task) == 0)


def test_errors():
    x = jnp.asarray(zoo())
    with pytest.raises(ValueError, match="unknown normalisation 'batch'"):
        normalise.fit("batch", x)
    with pytest.raises(ValueError, match="requires task ids"):
        normalise.fit("task", x)
    with pytest.raises(ValueError, match=r"covering 0 .. K-1"):
        normalise.fit("task", x, tasks=TASKS * 2)
    with pytest.raises(ValueError, match=r"adapters \[2, 7\] of 12"):
        normalise.fit("site_rms", x.at[2, 0, 0].set(jnp.nan).at[7, 1, 1].set(jnp.inf))
    with pytest.raises(ValueError, match=r"mask: got \(1, 6\)"):
        normalise.fit("site_rms", x, mask=MASK[:1])
    with pytest.raises(ValueError, match=r"expected \[n > 0, T, D\]"):
        normalise.fit("site_rms", x[0])
    with pytest.raises(ValueError, match="requires a task id"):
        normalise.apply(fit("task"), x[0])
    with pytest.raises(ValueError, match="requires a task id"):
        normalise.invert(fit("site_rms"), x[0], 1)
