"""Top-k routing: identities, the balance loss at its landmarks, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import router


def test_top_k_softmax_is_softmax_renormalised():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5)), jnp.float32)
    routes = router.top_k(logits, 2)
    soft = np.asarray(jax.nn.softmax(logits, axis=-1))
    best = np.sort(soft, axis=-1)[..., ::-1][..., :2]
    np.testing.assert_allclose(routes.weights, best / best.sum(-1, keepdims=True), rtol=1e-5)
    rows = router.dense_weights(routes.ids, routes.weights, 5)
    np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-6)
    assert int((rows > 0).sum()) == 2 * 12
    np.testing.assert_allclose(float(routes.load.sum()), 1, rtol=1e-6)


def test_balance_is_one_when_even_and_e_when_collapsed():
    even = router.top_k(20 * jnp.eye(4), 1)
    np.testing.assert_allclose(even.balance, 1, rtol=1e-5)
    collapsed = router.top_k(jnp.tile(jnp.asarray([[20.0, 0, 0, 0]]), (8, 1)), 1)
    np.testing.assert_allclose(collapsed.balance, 4, rtol=1e-5)


def test_balance_gradient_pushes_away_from_the_crowded_expert():
    logits = jnp.tile(jnp.asarray([[1.0, 0.0, 0.0]]), (8, 1))
    grad = jax.grad(lambda t: router.top_k(t, 1).balance)(logits)
    assert np.all(grad[:, 0] > 0) and np.all(grad[:, 1:] < 0)


def test_refusals():
    with pytest.raises(ValueError, match=r"top_k: expected in 1\.\.3, got 4"):
        router.top_k(jnp.zeros((2, 3)), 4)


def test_mutation_a_balance_without_e_is_seen(monkeypatch):
    good = router._balance
    monkeypatch.setattr(router, "_balance", lambda t, i: (good(t, i)[0] / 4, good(t, i)[1]))
    with pytest.raises(AssertionError):
        test_balance_is_one_when_even_and_e_when_collapsed()


def test_padding_counts_neither_in_the_balance_nor_in_the_load():
    """Against numpy in float64; logits of any shape, padding that is not finite."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 6, 5)).astype(np.float32)
    mask = rng.random((2, 6)) < 0.6
    padded = np.where(mask[..., None], logits, np.nan)
    routes, state = router.router(2)(jnp.asarray(padded), (), True, jnp.asarray(mask))
    real = logits[mask].astype(np.float64)
    soft = np.exp(real) / np.exp(real).sum(-1, keepdims=True)
    load = np.bincount(np.argsort(-real)[:, :2].ravel(), minlength=5) / (2 * len(real))
    np.testing.assert_allclose(routes.load, load, rtol=1e-6)
    np.testing.assert_allclose(routes.balance, 5 * np.sum(load * soft.mean(0)), rtol=1e-5)
    assert state == ()
