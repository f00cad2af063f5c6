"""Top-p routing against a loop over sorted probabilities, at its limits, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import top_p
from jlora.routing.top_p import TopP

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5)), jnp.float32)


def expected(p, at_most=5):
    """[2, 6, 5] weights, float64."""
    logits = np.asarray(LOGITS, np.float64)
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.zeros_like(soft)
    for at in np.ndindex(2, 6):
        total = 0.0
        for e in np.argsort(-soft[at])[:at_most]:
            out[at][e] = soft[at][e]
            total += soft[at][e]
            if total >= p:
                break
    return out


def check(rule, want):
    routes = rule.routes(LOGITS, {}, True)
    rows = np.zeros((2, 6, 5))
    np.put_along_axis(rows, np.asarray(routes.ids), np.asarray(routes.weights), axis=-1)
    np.testing.assert_allclose(rows, want, rtol=1e-5)
    np.testing.assert_allclose(routes.load, (want > 0).sum((0, 1)) / (want > 0).sum(), rtol=1e-6)


@pytest.mark.parametrize("at_most", [2, 0])
def test_value(at_most):
    want = expected(0.7, at_most or 5)
    check(TopP(0.7, at_most), want)
    rule = dataclasses.replace(TopP(0.7, at_most), renormalise=True)
    check(rule, want / want.sum(-1, keepdims=True))


def test_limits():
    """p = 1 is softmax over all experts, a tiny p the best expert alone."""
    check(TopP(1.0), np.asarray(jax.nn.softmax(LOGITS)))
    check(TopP(1e-9), expected(1e-9))
    assert (expected(1e-9) > 0).sum() == 12


def test_refusals():
    with pytest.raises(ValueError, match=r"TopP.p: got 1.5, expected in \(0, 1\]"):
        TopP(1.5)
    with pytest.raises(ValueError, match=r"TopP.at_most: got 6, expected 0\.\.5"):
        TopP(at_most=6).routes(LOGITS, {}, True)
    with pytest.raises(ValueError, match=r"TopP\.at_most: got -1"):
        TopP(at_most=-1)


def test_mutation_one_expert_fewer_is_seen(monkeypatch):
    cumsum = jnp.cumsum
    monkeypatch.setattr(top_p.jnp, "cumsum", lambda t, axis: cumsum(t, axis=axis) + t)
    with pytest.raises(AssertionError):
        check(TopP(0.7), expected(0.7))
