"""Bias-balanced routing: the value, the step of the bias, and that loads become even."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import bias_balanced
from jlora.routing.bias_balanced import BiasBalanced

RNG = np.random.default_rng(0)
SKEWED = jnp.asarray(RNG.normal([1.5, 1.0, 0, 0, -1], size=(60, 5)), jnp.float32)
BIAS = jnp.asarray([-0.4, 0.0, 0.2, 0.5, 0.1], jnp.float32)


def scores(gate):
    logits = np.asarray(SKEWED, np.float64)
    if gate == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def check(gate):
    routes, after = BiasBalanced(2, gate, 0.1)(SKEWED, {"bias": BIAS}, True, None)
    s = scores(gate)
    best = np.argsort(-(s + np.asarray(BIAS)), axis=-1)[:, :2]
    np.testing.assert_array_equal(routes.ids, best)
    kept = np.take_along_axis(s, best, axis=-1)
    np.testing.assert_allclose(routes.weights, kept / kept.sum(-1, keepdims=True), rtol=1e-5)
    load = np.bincount(best.ravel(), minlength=5) / 120
    step = 0.1 * np.sign(load.mean() - load)
    np.testing.assert_allclose(after["bias"], np.asarray(BIAS) + step, rtol=1e-5)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_value_and_step(gate):
    check(gate)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_the_state_evens_the_load(gate):
    rule = BiasBalanced(2, gate, 0.01)

    def train(state, _):
        routes, state = rule(SKEWED, state, True, None)
        return state, jnp.std(routes.load)

    state, spread = jax.jit(lambda s: jax.lax.scan(train, s, length=80))(rule.init_state(5))
    assert spread[-1] < 0.3 * spread[0]
    assert rule(SKEWED, state, False, None)[1] is state  # nothing moves outside of training


def test_weights_are_positive_whatever_the_bias_is():
    """What the code of SMoRA weighs by, score plus bias, is not."""
    bias = jnp.full(5, -2.0)
    routes = BiasBalanced(3).routes(SKEWED, {"bias": bias}, True)
    assert np.all(routes.weights > 0)
    np.testing.assert_allclose(routes.weights.sum(-1), 1, rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"k: got 4, expected 1\.\.3"):
        BiasBalanced(4).init_state(3)
    with pytest.raises(ValueError, match="gate: got 'relu'"):
        BiasBalanced(2, "relu")
    with pytest.raises(ValueError, match="rate: got -1"):
        BiasBalanced(rate=-1)


def test_mutation_a_bias_that_weighs_is_seen(monkeypatch):
    good = bias_balanced.reports.chosen
    moved = lambda s, i: good(s + BIAS[None], i)  # noqa: E731
    monkeypatch.setattr(bias_balanced.reports, "chosen", moved)
    with pytest.raises(AssertionError):
        check("sigmoid")
