"""Top-1 routing with and without its probability as weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import top_one
from jlora.routing.top_one import TopOne

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)), jnp.float32)


def check(scaled):
    routes = TopOne(scaled).routes(LOGITS, {}, True)
    logits = np.asarray(LOGITS, np.float64)
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(routes.ids[:, 0], logits.argmax(-1))
    np.testing.assert_allclose(routes.weights[:, 0], soft.max(-1) if scaled else 1, rtol=1e-5)
    load = np.bincount(logits.argmax(-1), minlength=4) / 7
    np.testing.assert_allclose(routes.balance, 4 * load @ soft.mean(0), rtol=1e-5)


@pytest.mark.parametrize("scaled", [True, False])
def test_value(scaled):
    check(scaled)


def test_a_weight_of_one_leaves_the_balance_loss_alone():
    """The router has a gradient from the weight where it is scaled, from the balance in both."""

    def slope(part, scaled):
        take = lambda t: jnp.sum(getattr(TopOne(scaled).routes(t, {}, True), part))  # noqa: E731
        return np.abs(jax.grad(take)(LOGITS)).max()

    assert slope("weights", True) > 0.01 and slope("weights", False) == 0
    assert slope("balance", False) > 0.01


def test_mutation_the_second_best_is_seen(monkeypatch):
    good = jax.lax.top_k
    second = lambda t, k: tuple(x[..., 1:] for x in good(t, k + 1))  # noqa: E731
    monkeypatch.setattr(top_one.jax.lax, "top_k", second)
    with pytest.raises(AssertionError):
        check(True)
