"""Capacity against a loop over queues, its limits, drop rates, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import capacity, reports
from jlora.routing.capacity import Capacity
from jlora.routing.router import TopK
from jlora.routing.top_one import TopOne

LOGITS = jnp.asarray(np.random.default_rng(0).normal([1, 0, 0, 0], size=(2, 6, 4)), jnp.float32)
MASK = jnp.asarray(np.random.default_rng(1).random((2, 6)) < 0.7)


def check(rule, mask=None):
    run = jax.jit(lambda m: [r.routes(LOGITS, {}, True, m) for r in (rule.rule, rule)])
    inner, routes = run(mask)
    ids, weights = (np.asarray(t).reshape(12, -1) for t in inner[:2])
    real = np.ones(12, bool) if mask is None else np.asarray(mask).reshape(12)
    asks = [(t, j) for j in range(ids.shape[1]) for t in range(12) if real[t]]
    if not rule.first_come:
        asks.sort(key=lambda at: -weights[at])
    room, want = dict.fromkeys(range(4), rule.limit), np.zeros_like(weights)
    for at in asks:
        if room[ids[at]]:
            room[ids[at]] -= 1
            want[at] = weights[at]
    np.testing.assert_array_equal(routes.ids, inner.ids)
    np.testing.assert_allclose(np.asarray(routes.weights).reshape(12, -1)[real], want[real])
    assert routes.balance == inner.balance
    dropped = reports.report(routes, mask)["dropped"]
    np.testing.assert_allclose(dropped, 1 - (want[real] > 0).mean(), rtol=1e-6)
    assert 0 < dropped < 1


@pytest.mark.parametrize("first_come", [True, False])
def test_value(first_come):
    check(Capacity(TopOne(), 2, first_come), None)
    check(Capacity(TopK(2), 2, first_come), MASK)


def test_room_for_all_is_the_rule_itself():
    for first_come in (True, False):
        routes = Capacity(TopK(2), 12, first_come).routes(LOGITS, {}, True)
        want = TopK(2).routes(LOGITS, {}, True)
        for got, one in zip(routes, want, strict=True):
            np.testing.assert_allclose(got, one, rtol=1e-6)
        assert reports.report(routes)["dropped"] == 0


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match=r"Capacity\.limit"):
        Capacity(TopOne(), 0)


def test_mutation_a_queue_that_counts_itself_is_seen(monkeypatch):
    cumsum = jnp.cumsum
    monkeypatch.setattr(capacity.jnp, "cumsum", lambda t, axis: cumsum(t, axis=axis) + 1)
    with pytest.raises(AssertionError):
        check(Capacity(TopOne(), 2))
