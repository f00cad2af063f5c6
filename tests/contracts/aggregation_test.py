"""Every aggregation obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax.numpy as jnp
import pytest

from jlora import registry
from jlora.algebra import LowRank
from jlora.contracts import aggregation
from jlora.contracts.aggregation import Aggregation, Round, error, laws_of, world
from jlora.federated.fedavg import weighted
from jlora.merging.exact.concat import concat

RECORDS = {p.system.name: p.system for p in registry.systems() if p.family == "federated"}
TRIALS = [(name, law) for name, record in RECORDS.items() for law in laws_of(record)]
TOLERANCE = 2e-5


def test_every_federated_system_has_the_contract():
    assert RECORDS and all(isinstance(r, Aggregation) for r in RECORDS.values())


@pytest.mark.parametrize(("name", "law"), TRIALS)
def test_law(name, law):
    record = RECORDS[name]
    found = error(law, record, world(record))
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def whole(bank, weights):
    return Round(concat(bank, weights))


GOOD = Aggregation(name="good", paper="-", symbol="-", evidence="-", aggregate=whole, exact=True)


def first_counts_double(bank, weights):
    return whole(bank, weights.at[0].multiply(2.0))


def counts_everyone(bank, weights):
    return whole(bank, weights + 0.01)


def squares(bank, weights):
    return whole(bank, weights * weights)


def factors_apart(bank, weights):
    return Round(LowRank(*(weighted(weights, t) for t in bank)))


def by_norm(bank, weights):
    norm = jnp.sqrt(jnp.sum(bank.u**2, axis=(1, 2)))
    return whole(bank, weights * norm / norm)


def by_python(bank, weights):
    calls.append(1)
    return whole(bank, weights * (1.0 if len(calls) % 2 else 2.0))


calls: list[int] = []
BROKEN = {
    "order": first_counts_double,
    "absent": counts_everyone,
    "equal": squares,
    "exact": factors_apart,
    "finite": by_norm,
    "jit": by_python,
}


@pytest.mark.parametrize("law", aggregation.LAWS)
def test_mutation_a_broken_record_fails_its_law(law):
    calls.clear()
    at = world(GOOD)
    assert error(law, GOOD, at) <= TOLERANCE
    assert error(law, dataclasses.replace(GOOD, aggregate=BROKEN[law]), at) > TOLERANCE


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
