"""Routing by label, and the loss from which a router learns labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import labels
from jlora.routing.router import dense_weights

RNG = np.random.default_rng(0)
LABELS = jnp.asarray([[0, 2, -1], [1, 2, 2]], jnp.int32)
LOGITS = jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)
MASK = jnp.asarray([[True, True, True], [True, False, True]])


def test_every_token_goes_to_its_expert_and_one_without_a_label_nowhere():
    routes = labels.hard(LABELS, 4, MASK)
    rows = np.zeros((2, 3, 4))
    for at in np.ndindex(2, 3):
        if LABELS[at] >= 0:
            rows[at][LABELS[at]] = 1
    np.testing.assert_array_equal(dense_weights(routes.ids, routes.weights, 4), rows)
    np.testing.assert_allclose(routes.load, [0.25, 0.25, 0.5, 0])


def check():
    logits = np.asarray(LOGITS, np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = [(0, 0), (0, 1), (1, 0), (1, 2)]
    want = -np.mean([log[i][LABELS[i]] for i in at])
    padded = jnp.where(MASK[..., None], LOGITS, jnp.nan)
    np.testing.assert_allclose(labels.label_loss(padded, LABELS, MASK), want, rtol=1e-5)
    grad = jax.grad(lambda t: labels.label_loss(t, LABELS, MASK))(padded)
    assert np.all(np.isfinite(grad)) and not np.any(grad[1, 1]) and not np.any(grad[0, 2])


def test_the_loss_is_the_cross_entropy_of_labelled_tokens():
    check()
    assert labels.label_loss(LOGITS, jnp.full((2, 3), -1)) == 0


def test_mutation_a_loss_of_all_tokens_is_seen(monkeypatch):
    good = jnp.maximum
    monkeypatch.setattr(labels.jnp, "maximum", lambda a, b: good(a, b) + 2)
    with pytest.raises(AssertionError):
        check()


def test_a_gate_learns_labels_from_the_loss_alone():
    centres = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
    which = jnp.asarray(RNG.integers(0, 4, 40), jnp.int32)
    x = centres[which] + jnp.asarray(0.2 * RNG.normal(size=(40, 6)), jnp.float32)
    slope = jax.grad(lambda w: labels.label_loss(x @ w, which))
    w = jax.lax.fori_loop(0, 60, lambda _, w: w - 0.5 * slope(w), jnp.zeros((6, 4)))
    assert np.mean(np.argmax(x @ w, axis=-1) == which) > 0.95
