"""Scopes do not change; what happens in them is in their record, and bodies count once."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jlora.core.lazy import leaf
from jlora.core.scope import Record, Scope
from jlora.core.site import Site

SITE = Site("w", (2, 2), "io", jnp.dtype("float32"))


def lazy(**side):
    own = {f"ctx:{name}": value for name, value in side.items()}
    return leaf(jnp.ones((2, 2)), SITE, None, own, {})


def test_a_scope_is_immutable():
    scope = Scope({}, {"key": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        scope.ctx = {}  # type: ignore[misc]
    assert scope.inside("call").calls_of == ("call",) and scope.calls_of == ()


def test_a_body_that_is_traced_twice_counts_once():
    scope = Scope({}, {}, record=Record(uses=[]))
    body = scope.fork(times=3)
    for _ in range(2):
        child = body.child()
        child.note(lazy(), "dot", {}, 10)
    scope.join(body, {})
    assert [(op, flops) for _, op, _, flops, _ in scope.uses] == [("dot", 30)]


def test_reports_of_a_body_are_numbered_after_those_outside():
    scope = Scope({}, {}, reporting=True)
    scope.report("w", 1)
    child = scope.fork().child()
    child.report("w", 2)
    assert child.aux == {"w": 2} and scope.aux == {"w": 1}
    scope.join(scope.fork(), child.aux)
    assert scope.aux == {"w": 1, "w#2": 2}


def test_a_body_knows_what_was_published_and_keeps_what_it_publishes():
    scope = Scope({}, {})
    body = scope.fork()
    scope.publish({"route": 1})
    child = body.child()
    child.publish({"other": 2})
    assert child.enter(lazy()) == {"route": 1, "other": 2}
    assert scope.enter(lazy()) == {"route": 1}
    child.publish({"route": 3})
    assert scope.published["route"] == 1


def test_keys_differ_between_bodies_steps_sites_and_uses():
    scope = Scope({}, {"key": jax.random.key(0)})
    first, second = scope.fork(), scope.fork()
    child = first.child(0)
    keys = [
        *(child.enter(lazy())["key"], child.enter(lazy())["key"]),
        *(first.child(1).enter(lazy())["key"], second.child(0).enter(lazy())["key"]),
        scope.enter(lazy())["key"],
    ]
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(data) == len(keys)
    again = first.child(0).enter(lazy())["key"]
    assert (jax.random.key_data(again) == jax.random.key_data(keys[0])).all()


def test_the_side_inputs_of_a_site_are_its_own():
    scope = Scope({}, {"mask": 0})
    assert scope.enter(lazy(gate=2)) == {"mask": 0, "gate": 2}
    assert scope.enter(lazy()) == {"mask": 0}
