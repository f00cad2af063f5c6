"""Every server obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import registry
from jlora.contracts import server
from jlora.contracts.server import Server, error, world
from jlora.serving import pool
from jlora.serving.pool import SYSTEM as GOOD

RECORDS = {p.system.name: p.system for p in registry.systems() if isinstance(p.system, Server)}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def at():
    return world((jl.LoRA(3), jl.LoRA(2), jl.LoRA(3), jl.LoRA(1)))


def test_the_servers_of_the_registry_are_tried():
    assert "Adapter pool" in RECORDS


@pytest.mark.parametrize("law", server.LAWS)
@pytest.mark.parametrize("name", RECORDS)
def test_law(name, law, at):
    record = RECORDS[name]
    found = error(law, record, at)
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def next_row(state, names, xs):
    """Every row by the adapter of the row before."""
    return pool.run(state, [*names[-1:], *names[:-1]], xs)


def first_for_base(state, names, xs):
    """A row without an adapter gets one."""
    known = sorted(state.slots)
    return pool.run(state, [known[0] if n is None else n for n in names], xs)


def base_for_unknown(state, names, xs):
    """A name that is not there is served by the base, and nobody is told."""
    return pool.run(state, [n if n in state.slots else None for n in names], xs)


def all_rows_fail(state, names, xs):
    found = pool.run(state, names, xs)
    bad = jnp.full_like(found.outputs, jnp.nan)
    return found._replace(outputs=bad) if found.errors else found


def keeps_the_rest(state, name, adapter):
    """A smaller adapter overwrites no more than its own rank."""
    before = state
    after = pool.load(state, name, adapter)
    top, rank = after.empty.sites[0][1].rank, adapter.sites[0][1].rank
    if rank == top:
        return after

    def mix(new, old):
        size = [k for k, n in enumerate(new.shape) if n == top]
        if not size or new.dtype != jnp.float32:
            return new
        live = jnp.arange(top) < rank
        shape = [1] * new.ndim
        shape[size[-1]] = top
        return jnp.where(live.reshape(shape), new, old)

    bank = jax.tree.map(mix, after.served.bank, before.served.bank)
    return dataclasses.replace(after, served=dataclasses.replace(after.served, bank=bank))


def forgets_the_name_alone(state, name):
    """The arrays of an adapter that is unloaded stay in its slot."""
    after = pool.unload(state, name)
    return dataclasses.replace(after, served=state.served)


def keeps_the_name(state, name):
    pool.unload(state, name)
    return state


def by_count(state, name, adapter):
    """The answers depend on how many adapters there are."""
    after = pool.load(state, name, adapter)
    scaled = {k: v * (1 + 1e-6 * len(after.slots)) for k, v in after.params.items()}
    return dataclasses.replace(after, params=scaled)


def compiles_anew(state, names, xs):
    known = tuple(sorted(state.slots))

    def other(params, x):
        return state.model(params, x) + 0.0 * len(known)

    return pool.run(dataclasses.replace(state, model=other), names, xs)


def sorts(state, name, adapter):
    """The first adapter that is loaded is served twice as strong."""
    if not state.slots:
        twice = {p: {**t, "b": 2 * t["b"]} for p, t in adapter.trainable.items()}
        adapter = adapter.replace(trainable=twice)
    return pool.load(state, name, adapter)


def evicts(state, name, adapter):
    """A full pool drops its first adapter."""
    if not state.free:
        state = pool.unload(state, min(state.slots))
    return pool.load(state, name, adapter)


def overwrites(state, name, adapter):
    state = pool.unload(state, name) if name in state.slots else state
    return pool.load(state, name, adapter)


BROKEN = [
    ("rows", {"run": next_row}),
    ("base", {"run": first_for_base}),
    ("unknown", {"run": base_for_unknown}),
    ("unknown", {"run": all_rows_fail}),
    ("unload", {"unload": forgets_the_name_alone, "load": keeps_the_rest}),
    ("unload", {"unload": keeps_the_name}),
    ("isolated", {"load": by_count}),
    ("swap", {"run": compiles_anew}),
    ("order", {"load": sorts}),
    ("full", {"load": evicts}),
    ("full", {"load": overwrites}),
]


@pytest.mark.parametrize(("law", "wrong"), BROKEN, ids=lambda c: c if isinstance(c, str) else "")
def test_mutation_a_broken_record_fails_its_law(law, wrong, at):
    assert error(law, dataclasses.replace(GOOD, **wrong), at) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, _ in BROKEN} == set(server.LAWS) == set(server.CHECKS)


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
