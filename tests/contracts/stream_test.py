"""Every stream obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jlora import registry
from jlora.continual import o_lora
from jlora.continual.o_lora import SYSTEM as GOOD
from jlora.continual.separate import SYSTEM as SEPARATE
from jlora.contracts.stream import LAWS, Stream
from jlora.contracts.stream_laws import CHECKS, World, error, laws_of

RECORDS = {p.system.name: p.system for p in registry.systems() if isinstance(p.system, Stream)}
TRIALS = [
    (name, k, law)
    for name, record in RECORDS.items()
    for k in range(len(record.examples))
    for law in laws_of(record)
]
TOLERANCE = 2e-5
AT = World(GOOD.examples[0])


def test_every_stream_has_the_contract():
    continual = [p.system for p in registry.systems() if p.family == "continual"]
    others = [s for s in continual if not isinstance(s, Stream)]
    assert len(RECORDS) >= 3 and all(s.kind == "component" for s in others)


@pytest.mark.parametrize(("name", "example", "law"), TRIALS)
def test_law(name, example, law):
    record = RECORDS[name]
    found = error(law, record, World(record.examples[example]))
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def not_fresh(key, state):
    """b is not zero."""
    a = GOOD.start(key, state)
    return a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))


def alone(state, adapter):
    """The tasks before do not run in the training of a new one."""
    del state
    return adapter


def without_the_latest(state, task):
    found = GOOD.adapter(state, task)
    return found if len(state.tasks) < 2 else GOOD.adapter(
        state._replace(tasks=state.tasks[:-1]), 0
    )  # fmt: skip


def shared(state, task):
    """The latest adapter serves all tasks."""
    SEPARATE.adapter(state, task)
    return state.tasks[-1]


def the_last_for_unseen(state, task):
    """Python's negative indices, and nothing is served by the base."""
    if not state.tasks:
        return state.fresh
    return GOOD.adapter(state, min(max(task, 0), len(state.tasks) - 1))


def held(state, adapter):
    return GOOD.running(state, jax.lax.stop_gradient(adapter))


def rooted(state, adapter):
    """The norm of what is zero."""
    return sum((jnp.sqrt(jnp.sum(t["b"] ** 2)) for t in adapter.trainable.values()), jnp.zeros(()))


def drawn_anew(key, state):
    calls.append(1)
    return GOOD.start(jax.random.fold_in(key, len(calls)), state)


def by_python(state, adapter):
    calls.append(1)
    return GOOD.penalty(state, adapter) * len(calls)


calls: list[int] = []
BROKEN = [
    ("identity", GOOD, {"start": not_fresh}),
    ("continues", GOOD, {"running": alone}),
    ("served", GOOD, {"adapter": without_the_latest}),
    ("kept", SEPARATE, {"adapter": shared}),
    ("unseen", GOOD, {"adapter": the_last_for_unseen}),
    ("gradient", GOOD, {"running": held}),
    ("gradient", GOOD, {"penalty": rooted}),
    ("resume", GOOD, {"start": drawn_anew}),
    ("jit", GOOD, {"penalty": by_python}),
]


@pytest.mark.parametrize(("law", "record", "wrong"), BROKEN, ids=[row[0] for row in BROKEN])
def test_mutation_a_broken_record_fails_its_law(law, record, wrong):
    calls.clear()
    assert error(law, dataclasses.replace(record, **wrong), AT) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, *_ in BROKEN} == set(LAWS) == set(CHECKS)


def test_refusals():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
    with pytest.raises(ValueError, match="examples: got none, expected adaptation methods"):
        dataclasses.replace(GOOD, examples=())
    with pytest.raises(IndexError, match="task 2: got 2 tasks so far"):
        o_lora.seen(2, 2)
