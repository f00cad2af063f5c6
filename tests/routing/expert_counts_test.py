"""Experts that are not there: padded routes are those of fewer experts, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import expert_counts
from jlora.routing.bias_balanced import BiasBalanced
from jlora.routing.expert_counts import FirstExperts, within
from jlora.routing.router import TopK
from jlora.routing.top_p import TopP

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 5)), jnp.float32)


def check(rule, count=3):
    padded = expert_counts.within(rule, LOGITS, count, {}, True)
    ragged = rule.routes(LOGITS[..., :count], {}, True)
    k = ragged.ids.shape[-1]
    np.testing.assert_array_equal(padded.ids[..., :k], ragged.ids)
    np.testing.assert_allclose(padded.weights[..., :k], ragged.weights, rtol=1e-6)
    assert not np.any(padded.weights[..., k:])
    np.testing.assert_allclose(padded.load, [*ragged.load, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(padded.balance, ragged.balance, rtol=1e-6)


@pytest.mark.parametrize("rule", [TopK(2), TopK(3), TopP(0.7)], ids=repr)
def test_padded_is_ragged(rule):
    check(rule)
    assert FirstExperts(rule, 5).routes(LOGITS, {}, True).balance == pytest.approx(
        rule.routes(LOGITS, {}, True).balance
    )


def test_gradients_are_those_of_fewer_experts():
    def loss(t, count, rule=TopK(2)):  # noqa: B008
        routes = within(rule, t, count, {}, True)
        return jnp.sum(routes.weights[..., 0]) + routes.balance

    slope = jax.jit(jax.grad(loss))
    padded = slope(LOGITS, jnp.int32(3))
    ragged = slope(LOGITS[..., :3], jnp.int32(3))
    assert not np.any(padded[..., 3:])
    np.testing.assert_allclose(padded[..., :3], ragged, rtol=1e-5, atol=1e-7)


def test_a_rule_with_a_state_is_refused():
    with pytest.raises(ValueError, match=r"FirstExperts\.rule: got BiasBalanced"):
        FirstExperts(BiasBalanced(2), 3)


def test_mutation_a_balance_of_all_experts_is_seen(monkeypatch):
    good = expert_counts.within

    def of_all(*args):
        routes = good(*args)
        return routes._replace(balance=routes.balance * 5 / 3)

    monkeypatch.setattr(expert_counts, "within", of_all)
    with pytest.raises(AssertionError):
        check(TopK(2))
