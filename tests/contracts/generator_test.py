"""Every generator obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import registry
from jlora.contracts import generator
from jlora.contracts.generator import Generator, error, laws_of, world
from jlora.generation.baselines import soup

RECORDS = {p.system.name: p.system for p in registry.systems() if isinstance(p.system, Generator)}
TRIALS = [(name, law) for name, record in RECORDS.items() for law in laws_of(record)]
TOLERANCE = 2e-5


@functools.cache
def of_width(width):
    return world(jl.LoRA(2, freeze_a=True), width=width)


@pytest.fixture(scope="module")
def at():
    return of_width(4)


def test_the_generators_of_the_registry_are_tried():
    names = ("Mean adapter", "Kernel ridge from condition to adapter")
    assert {*names, "Conditional flow over adapters"} <= RECORDS.keys()
    rivals = ("ICM-LoRA", "Text-to-LoRA", "Drag-and-Drop LLMs")
    assert {*rivals, "Gaussian over principal components"} <= RECORDS.keys()


@pytest.mark.parametrize(("name", "law"), TRIALS)
def test_law(name, law):
    record = RECORDS[name]
    found = error(law, record, of_width(record.width))
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


# --- a generator with noise, which is right, and one that is wrong for every law -----------------


def fit(key, conditions, tasks, bank):
    return soup.examples(conditions, tasks, bank)


def noisy(key, state, condition):
    """Soups weighted by the condition, and what a key adds."""
    condition = generator.checked(condition, state.conditions.shape[1])
    weights = jax.nn.softmax(state.conditions @ condition)
    weights = weights + 0.1 * jax.random.normal(key, weights.shape)
    return soup.mixed(weights[None], state.soups)


GOOD = Generator(name="good", paper="-", symbol="-", evidence="-", fit=fit, generate=noisy)
MEAN = RECORDS["Mean adapter"]


def by_python(key, state, condition):
    calls.append(1)
    return noisy(jax.random.fold_in(key, len(calls)), state, condition)


@jax.custom_batching.custom_vmap
def centred(weights):
    return weights


@centred.def_vmap
def over_the_batch(size, batched, weights):
    return weights - jnp.mean(weights, axis=0, keepdims=True), True


def batched(key, state, condition):
    condition = generator.checked(condition, state.conditions.shape[1])
    return soup.mixed(centred(state.conditions @ condition)[None], state.soups)


def other_sites(key, state, condition):
    made = noisy(key, state, condition)
    return made.replace(sites=made.sites[:1])


def other_dtype(key, state, condition):
    made = noisy(key, state, condition)
    half = jax.tree.map(lambda t: t.astype(jnp.bfloat16), made.trainable)
    return made.replace(trainable=half)


def first_counts_double(key, conditions, tasks, bank):
    tasks = jnp.where(jnp.arange(len(tasks)) == 0, 99, tasks)
    return soup.examples(conditions, tasks, bank)


def takes_anything(key, state, condition):
    weights = jax.nn.softmax(state.conditions @ jnp.nan_to_num(condition.reshape(-1)[:4]))
    return soup.mixed(weights[None], state.soups)


def deaf(key, state, condition):
    return noisy(key, state, 0.0 * condition)


def knows_when_traced(key, state, condition):
    traced = isinstance(condition, jax.core.Tracer)
    return noisy(key, state, condition * (2.0 if traced else 1.0))


calls: list[int] = []
BROKEN = [
    ("same", GOOD, {"generate": by_python}),
    ("batch", GOOD, {"generate": batched}),
    ("valid", GOOD, {"generate": other_sites}),
    ("valid", GOOD, {"generate": other_dtype}),
    ("order", MEAN, {"fit": first_counts_double}),
    ("refused", GOOD, {"generate": takes_anything}),
    ("conditioned", GOOD, {"generate": deaf}),
    ("jit", GOOD, {"generate": knows_when_traced}),
]


@pytest.mark.parametrize("law", laws_of(GOOD))
def test_a_generator_with_noise_obeys(law, at):
    assert error(law, GOOD, at) <= TOLERANCE


@pytest.mark.parametrize(("law", "record", "wrong"), BROKEN, ids=[row[0] for row in BROKEN])
def test_mutation_a_broken_record_fails_its_law(law, record, wrong, at):
    calls.clear()
    assert error(law, dataclasses.replace(record, **wrong), at) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, *_ in BROKEN} == set(generator.LAWS) == set(generator.CHECKS)


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
