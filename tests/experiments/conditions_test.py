"""Conditions: drawn from the task's own training texts, centred on the seen tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stages import conditions
from experiments.stages.conditions import Table


@pytest.fixture
def table():
    members = np.array([[[0, 1, 2, 0], [3, 4, 3, 4]]], np.int32)  # class 0: 3 texts, class 1: 2
    words = np.arange(2 * 2 * 2, dtype=np.float32).reshape(1, 2, 2, 2) + 100
    return Table(
        jnp.asarray(words), jnp.asarray(members), jnp.asarray([[3, 2]]), jnp.zeros((1, 2, 2))
    )


def test_rows_have_the_label_they_say(table):
    keys = jax.random.split(jax.random.key(1), 50)
    rows, labels = jax.vmap(lambda k: conditions.random_rows(table, k, jnp.int32(0), 8))(keys)
    for label, allowed in ((0, {0, 1, 2}), (1, {3, 4})):
        assert set(np.asarray(rows)[np.asarray(labels) == label].tolist()) == allowed


def test_a_condition_is_words_and_mean_examples_of_each_class(table):
    embedding = jnp.asarray(np.eye(5, 2, dtype=np.float32))
    got = conditions.random(table, embedding, jax.random.key(0), jnp.int32(0), 64)
    assert got.shape == (4, 2)
    words = np.asarray(table.words)[0]
    for side in (0, 1):
        assert any((got[2 * side] == w).all() for w in words[side])
    # Class 0 holds texts 0, 1, 2 = e0, e1, 0: a mean near (1/3, 1/3); class 1 only zero rows.
    np.testing.assert_allclose(got[1], [1 / 3, 1 / 3], atol=0.2)
    np.testing.assert_array_equal(got[3], [0, 0])


def test_scaling_centres_the_seen_tasks():
    raw = np.random.default_rng(0).normal(3, 2, (7, 4, 5)).astype(np.float32)
    stats = conditions.scaling(raw)
    out = np.asarray(conditions.scaled(stats, jnp.asarray(raw)))
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-5)
    assert abs(float((out**2).mean()) - 1) < 1e-5
    shifted = stats._replace(mean=stats.mean + 1)  # mutation
    assert abs(np.asarray(conditions.scaled(shifted, jnp.asarray(raw))).mean()) > 0.1
