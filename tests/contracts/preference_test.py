"""Every preference objective obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import registry
from jlora.contracts import preference
from jlora.contracts.preference import Preference, error, laws_of, world
from jlora.preference.dpo import SYSTEM as GOOD
from jlora.preference.dpo import dpo
from jlora.preference.pairs import against_base

RECORDS = {p.system.name: p.system for p in registry.systems() if p.family == "preference"}
RECORDS = {name: r for name, r in RECORDS.items() if r.kind != "component"}
TRIALS = [(name, law) for name, record in RECORDS.items() for law in laws_of(record)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def at():
    return world(jl.LoRA(2))


def test_every_objective_has_the_contract():
    assert len(RECORDS) >= 3 and all(isinstance(r, Preference) for r in RECORDS.values())


@pytest.mark.parametrize(("name", "law"), TRIALS)
def test_law(name, law, at):
    record = RECORDS[name]
    found = error(law, record, at)
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def without_reference(log_probs, params, adapter, batch):
    policy = log_probs(params, adapter, batch)
    return dpo(policy, jax.tree.map(jnp.zeros_like, policy))


def upside_down(log_probs, params, adapter, batch):
    return against_base(lambda policy, base: dpo(base, policy))(log_probs, params, adapter, batch)


def scaled_apart(log_probs, params, adapter, batch):
    def loss(policy, base):
        return dpo(policy._replace(chosen=1.1 * policy.chosen), base)

    return against_base(loss)(log_probs, params, adapter, batch)


def with_slopes(log_probs, params, adapter, batch):
    """The right value; the reference pulls on the weights."""
    return dpo(log_probs(params, adapter, batch), log_probs(params, None, batch))


def the_adapter_held(log_probs, params, adapter, batch):
    """The reference is the adapter itself, held."""
    return dpo(
        log_probs(params, adapter, batch),
        jax.lax.stop_gradient(log_probs(params, adapter, batch)),
    )


def twice_off(log_probs, params, adapter, batch):
    log_probs(params, None, batch)
    return GOOD.objective(log_probs, params, adapter, batch)


def over_the_batch(log_probs, params, adapter, batch):
    found = GOOD.objective(log_probs, params, adapter, batch)
    return found - jnp.mean(found)


def overflows(log_probs, params, adapter, batch):
    def loss(policy, base):
        return jnp.log1p(jnp.exp(-(policy.chosen - policy.rejected - base.chosen + base.rejected)))

    return against_base(loss)(log_probs, params, adapter, batch)


def by_python(log_probs, params, adapter, batch):
    calls.append(1)
    return GOOD.objective(log_probs, params, adapter, batch) * len(calls)


calls: list[int] = []
BROKEN = [
    ("start", without_reference),
    ("sign", upside_down),
    ("shift", scaled_apart),
    ("reference", with_slopes),
    ("reference", the_adapter_held),
    ("reference", twice_off),
    ("rows", over_the_batch),
    ("finite", overflows),
    ("jit", by_python),
]


@pytest.mark.parametrize(("law", "wrong"), BROKEN)
def test_mutation_a_broken_record_fails_its_law(law, wrong, at):
    calls.clear()
    assert error(law, dataclasses.replace(GOOD, objective=wrong), at) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, _ in BROKEN} == set(preference.LAWS) == set(preference.CHECKS)


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
