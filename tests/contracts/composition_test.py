"""Every composition of denoisers obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import registry
from jlora.compose.composite import composite
from jlora.contracts import composition
from jlora.contracts.composition import Composition, alike, error, world

RECORDS = {p.system.name: p.system for p in registry.systems() if p.family == "compose"}
RECORDS = {name: r for name, r in RECORDS.items() if r.kind != "component"}
TOLERANCE = 2e-5
METHODS = (jl.LoRA(2), jl.LoRA(1), jl.LoRA(2))
GOOD = Composition(
    name="good", paper="-", symbol="-", evidence="-", prepare=jl.stack, denoise=composite
)


@pytest.fixture(scope="module")
def at():
    return world(METHODS)


def test_every_composition_has_the_contract():
    assert len(RECORDS) >= 4 and all(isinstance(r, Composition) for r in RECORDS.values())


@pytest.mark.parametrize("law", composition.LAWS)
@pytest.mark.parametrize("name", RECORDS)
def test_law(name, law, at):
    record = RECORDS[name]
    found = error(law, record, at)
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def halved(model, params, bank, w, z, t):
    return composite(model, params, bank, 0.5 * w, z, t)


def without_the_base(model, params, bank, w, z, t):
    return composite(model, params, bank, w, z, t) - (1.0 - jnp.sum(w)) * model(params, z, t)


def counts_everyone(model, params, bank, w, z, t):
    return composite(model, params, bank, w + 0.1 * jnp.max(jnp.abs(w)), z, t)


def first_counts_double(model, params, bank, w, z, t):
    return composite(model, params, bank, w.at[0].multiply(2.0), z, t)


def one_after_the_other(adapters, steps):
    return alike(adapters, steps) * jnp.linspace(2.0, 0.1, adapters)[None]


@jax.custom_batching.custom_vmap
def total(w):
    return jnp.sum(w)


@total.def_vmap
def of_the_whole_batch(size, batched, w):
    return jnp.full(size, jnp.sum(w) / size), True


def normalised_by_the_batch(model, params, bank, w, z, t):
    """One number for all samples, where each has its own."""
    return composite(model, params, bank, w / total(w), z, t)


def remembers(model, params, bank, w, z, t):
    calls.append(1)
    return composite(model, params, bank, w, z, t) * len(calls)


def held(model, params, bank, w, z, t):
    return composite(model, params, bank, jax.lax.stop_gradient(w), z, t)


def rooted(model, params, bank, w, z, t):
    return composite(model, params, bank, w * jnp.sqrt(jnp.abs(w) / jnp.abs(w)), z, t)


calls: list[int] = []
BROKEN = [
    ("single", {"denoise": halved}),
    ("zero", {"denoise": without_the_base}),
    ("absent", {"denoise": counts_everyone}),
    ("order", {"denoise": first_counts_double}),
    ("turns", {"weights": one_after_the_other}),
    ("batch", {"denoise": normalised_by_the_batch}),
    ("scan", {"denoise": remembers}),
    ("finite", {"denoise": held}),
    ("finite", {"denoise": rooted}),
    ("jit", {"denoise": remembers}),
]


@pytest.mark.parametrize("law", composition.LAWS)
def test_the_double_is_right_before_it_is_broken(law, at):
    assert error(law, GOOD, at) <= TOLERANCE


@pytest.mark.parametrize(("law", "wrong"), BROKEN)
def test_mutation_a_broken_record_fails_its_law(law, wrong, at):
    calls.clear()
    assert error(law, dataclasses.replace(GOOD, **wrong), at) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, _ in BROKEN} == set(composition.LAWS) == set(composition.CHECKS)


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
