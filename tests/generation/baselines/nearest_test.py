"""Nearest and softmax-weighted soups."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.baselines import nearest, soup

RNG = np.random.default_rng(0)
Q, C = RNG.normal(size=(3, 4)).astype("f4"), RNG.normal(size=(6, 4)).astype("f4")


def test_similarities_match_numpy():
    cosine = (Q @ C.T) / np.linalg.norm(Q, axis=1)[:, None] / np.linalg.norm(C, axis=1)
    distance = -((Q[:, None] - C[None]) ** 2).sum(-1)
    np.testing.assert_allclose(nearest.similarity(Q, C), cosine, atol=1e-5)
    np.testing.assert_allclose(nearest.similarity(Q, C, "distance"), distance, atol=1e-4)


def test_softmax_limits_are_nearest_and_mean():
    s = nearest.similarity(Q, C)
    np.testing.assert_allclose(nearest.softmax(s, 1e-4), nearest.nearest(s), atol=1e-6)
    hot = nearest.softmax(s, 1e6)
    np.testing.assert_allclose(hot, np.broadcast_to(soup.mean_weights(6), (3, 6)), atol=1e-5)
    weights = np.exp(np.asarray(s) / 0.3)
    want = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(nearest.softmax(s, 0.3), want, atol=1e-5)


def test_a_training_condition_finds_its_own_entry():
    for kind in nearest.KINDS:
        found = nearest.nearest(nearest.similarity(C, C, kind))
        np.testing.assert_array_equal(found, np.eye(6))


def test_temperature_minimises_the_leave_one_task_out_error():
    """Deltas that follow the condition want a sharp softmax, unrelated ones a flat one."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    c = np.stack([np.cos(angle), np.sin(angle)], 1).astype("f4")
    groups = jnp.arange(24)
    s = nearest.similarity(c, c)
    grid = (0.003, 0.03, 0.3, 3.0)

    def brute(y, tau):
        total = 0.0
        for i in range(24):
            logits = np.delete(np.asarray(s)[i], i) / tau
            w = np.exp(logits - logits.max())
            total += ((y[i] - (w / w.sum()) @ np.delete(y, i, 0)) ** 2).sum()
        return total / 24

    for y, sharp in ((c, True), (RNG.normal(size=(24, 5)).astype("f4"), False)):
        best, errors = nearest.choose_temperature(s, jnp.asarray(y @ y.T), groups, grid)
        np.testing.assert_allclose(errors, [brute(y, t) for t in grid], rtol=1e-2, atol=1e-4)
        assert (best < 0.1) == sharp


def test_leave_out_excludes_the_whole_task():
    groups = jnp.asarray([0, 0, 1, 1, 2, 2])
    w = np.asarray(nearest.softmax(nearest.leave_out(nearest.similarity(C, C), groups), 1.0))
    assert (w[np.asarray(groups)[:, None] == np.asarray(groups)[None]] == 0).all()
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-6)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"'l1'.*cosine"):
        nearest.similarity(Q, C, "l1")
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(6, 3\)"):
        nearest.similarity(Q, C[:, :3])
    gram = jnp.eye(6)
    with pytest.raises(ValueError, match="above 0"):
        nearest.choose_temperature(gram, gram, jnp.arange(6), [0.0])
    with pytest.raises(ValueError, match="two tasks"):
        nearest.choose_temperature(gram, gram, jnp.zeros(6), [1.0])
