"""Every router obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import registry
from jlora.contracts import router
from jlora.contracts.router import Router, Routes, error, world

RECORDS = {p.system.name: p.system for p in registry.systems() if isinstance(p.system, Router)}
TOLERANCE = 2e-5


def test_the_routers_of_the_registry_are_tried():
    assert "Top-k router with balance loss" in RECORDS


@functools.cache
def compiled(name):
    """A record whose route is compiled once per shape, and its world."""
    record = RECORDS[name]
    run = jax.jit(record.route, static_argnums=2)
    return dataclasses.replace(record, route=run), world(record)


@pytest.mark.parametrize("law", router.LAWS)
@pytest.mark.parametrize("name", RECORDS)
def test_law(name, law):
    record, (quick, at) = RECORDS[name], compiled(name)
    found = error(law, record if law == "jit" else quick, at)
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


# --- a router with a balance state, which is right, and one that is wrong for every law ----------


class Bias(NamedTuple):
    """What is added to the scores of experts when they are chosen, and how often it was updated."""

    bias: jax.Array  # [E]
    updates: jax.Array  # [], int32


def shares(ids, experts, mask):
    hot = jnp.sum(jax.nn.one_hot(ids, experts), axis=1)
    real = jnp.ones(len(ids)) if mask is None else mask.astype(jnp.float32)
    return jnp.sum(hot * real[:, None], axis=0) / (2 * jnp.maximum(jnp.sum(real), 1.0))


def sigmoid_routes(logits, bias, mask):
    """Two experts by score plus bias, weighted by their scores alone."""
    scores = jax.nn.sigmoid(logits)
    _, ids = jax.lax.top_k(scores + bias[None], 2)
    chosen = jnp.take_along_axis(scores, ids, axis=1)
    return Routes(ids, chosen, jnp.zeros(()), shares(ids, logits.shape[1], mask))


def updated(state, load):
    return Bias(state.bias + 0.01 * jnp.sign(jnp.mean(load) - load), state.updates + 1)


def probabilities(logits, state, train, mask):
    """Weights are the scores themselves."""
    routes = sigmoid_routes(logits, state.bias, mask)
    return routes, updated(state, routes.load) if train else state


def normalised(logits, state, train, mask):
    """Weights are the scores divided by their sum."""
    routes, after = probabilities(logits, state, train, mask)
    total = jnp.sum(routes.weights, axis=1, keepdims=True)
    return routes._replace(weights=routes.weights / total), after


def fresh(experts):
    return Bias(jnp.zeros(experts), jnp.zeros((), jnp.int32))


GOOD = Router(name="good", paper="-", symbol="-", evidence="-", init_state=fresh, route=normalised)
SCORES = dataclasses.replace(GOOD, route=probabilities, probability=jax.nn.sigmoid)


def halved(logits, state, train, mask):
    routes, after = normalised(logits, state, train, mask)
    return routes._replace(weights=0.5 * routes.weights), after


def below_zero(logits, state, train, mask):
    routes, after = normalised(logits, state, train, mask)
    return routes._replace(weights=routes.weights + jnp.asarray([[1.0, -1.0]])), after


def the_best_twice(logits, state, train, mask):
    routes, after = normalised(logits, state, train, mask)
    return routes._replace(ids=jnp.repeat(routes.ids[:, :1], 2, axis=1)), after


def mean_score(logits, state, train, mask):
    routes, after = normalised(logits, state, train, mask)
    return routes._replace(load=jnp.mean(jax.nn.softmax(logits), axis=0)), after


def drops_in_silence(logits, state, train, mask):
    """The second choice is dropped and still counted."""
    routes, after = normalised(logits, state, train, mask)
    return routes._replace(weights=jnp.ones_like(routes.weights).at[:, 1].set(0.0)), after


def takes_over(logits, state, train, mask):
    """The weight of a dropped choice goes to the other."""
    routes, after = probabilities(logits, state, train, mask)
    both = jnp.sum(routes.weights, axis=1)
    return routes._replace(weights=jnp.stack([both, jnp.zeros_like(both)], axis=1)), after


def prefers_the_first(logits, state, train, mask):
    return normalised(logits + jnp.linspace(2.0, 0.0, 5)[None], state, train, mask)


def prefers_by_position(logits, state, train, mask):
    tilt = jnp.linspace(0.0, 3.0, len(logits))[:, None] * jnp.asarray([[1.0, 0, -1, 0, 1]])
    return normalised(logits + tilt, state, train, mask)


def counts_padding(logits, state, train, mask):
    return normalised(logits, state, train, None)


def divides_by_no_tokens(logits, state, train, mask):
    routes, after = normalised(logits, state, train, mask)
    real = len(logits) if mask is None else jnp.sum(mask).astype(jnp.float32)
    return routes._replace(balance=jnp.ones(()) * 0.0 / real), after


def remembers(logits, state, train, mask):
    calls.append(1)
    routes, after = normalised(logits, state, train, mask)
    return routes._replace(balance=jnp.asarray(float(len(calls)))), after


def always_updates(logits, state, train, mask):
    return normalised(logits, state, True, mask)


def cut_off(logits, state, train, mask):
    return normalised(jax.lax.stop_gradient(logits), state, train, mask)


def knows_when_traced(logits, state, train, mask):
    routes, after = normalised(logits, state, train, mask)
    traced = isinstance(logits, jax.core.Tracer)
    return routes._replace(balance=jnp.asarray(float(traced))), after


calls: list[int] = []
BROKEN = [
    ("weights", GOOD, halved),
    ("weights", GOOD, below_zero),
    ("weights", GOOD, probabilities),  # which do not sum to 1
    ("weights", SCORES, normalised),  # which do
    ("weights", SCORES, takes_over),
    ("ids", GOOD, the_best_twice),
    ("load", GOOD, mean_score),
    ("load", GOOD, drops_in_silence),
    ("experts", GOOD, prefers_the_first),
    ("tokens", GOOD, prefers_by_position),
    ("padded", GOOD, counts_padding),
    ("padded", GOOD, divides_by_no_tokens),
    ("scan", GOOD, remembers),
    ("inference", GOOD, always_updates),
    ("gradient", GOOD, cut_off),
    ("jit", GOOD, knows_when_traced),
]


@pytest.mark.parametrize("law", router.LAWS)
@pytest.mark.parametrize("record", [GOOD, SCORES], ids=["sum is 1", "sum of scores"])
def test_a_router_with_a_balance_state_obeys(law, record):
    assert error(law, record, world(record)) <= TOLERANCE


@pytest.mark.parametrize(("law", "record", "wrong"), BROKEN)
def test_mutation_a_broken_record_fails_its_law(law, record, wrong):
    calls.clear()
    at = world(record)
    assert error(law, dataclasses.replace(record, route=wrong), at) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, *_ in BROKEN} == set(router.LAWS) == set(router.CHECKS)


def test_the_balance_state_evens_the_load():
    """The double is no straw man: its bias brings the load of skewed logits close to even."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal([1.5, 1.0, 0, 0, -1], size=(60, 5)), jnp.float32)
    state, step = GOOD.init_state(5), jax.jit(GOOD.route, static_argnums=2)
    first, _ = step(logits, state, False, None)
    for _ in range(60):
        last, state = step(logits, state, True, None)
    assert np.ptp(first.load) > 0.3 > 0.1 > np.ptp(last.load)


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
