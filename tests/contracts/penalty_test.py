"""Every penalty obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jlora as jl
from jlora import registry
from jlora.contracts import penalty
from jlora.contracts.penalty import Penalty, error, laws_of, world


def sizes(adapter, params, ctx):
    """Half the squared norm of every delta, by the Gram matrices of its factors; a sum."""
    del params, ctx
    total = jnp.zeros((), jnp.float32)
    for site, _ in adapter.sites:
        p = adapter.trainable[site.path]
        left, right = p["a"].mT @ p["a"], p["b"] @ p["b"].mT
        total = total.astype(left.dtype) + 0.5 * jnp.sum(left * right)
    return total


def without_b(adapter):
    t = {p: {**t, "b": jnp.zeros_like(t["b"])} for p, t in adapter.trainable.items()}
    return adapter.replace(trainable=t)


GOOD = Penalty(
    name="size of deltas",
    paper="-",
    symbol="-",
    evidence="-",
    examples=(jl.LoRA(2),),
    penalty=sizes,
    zero=without_b,
    additive=True,
)
FOUND = {p.system.name: p.system for p in registry.systems() if p.family == "penalties"}
RECORDS = FOUND | {GOOD.name: GOOD}
TRIALS = [
    (name, k, law)
    for name, record in RECORDS.items()
    for k in range(len(record.examples))
    for law in laws_of(record)
]
TOLERANCE = 2e-5


def test_every_penalty_has_the_contract():
    assert FOUND and all(isinstance(r, Penalty) for r in FOUND.values())


@pytest.mark.parametrize(("name", "example", "law"), TRIALS)
def test_law(name, example, law):
    record = RECORDS[name]
    found = error(law, record, world(record, example=example))
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def rooted(adapter, params, ctx):
    """A norm: its gradient at zero is 0 / 0."""
    return jnp.sqrt(sizes(adapter, params, ctx))


def below_zero(adapter, params, ctx):
    return sizes(adapter, params, ctx) - 1e-2


def of_a(adapter, params, ctx):
    """Not zero where b is."""
    return sizes(adapter, params, ctx) + sum(
        jnp.sum(t["a"] ** 2) for t in adapter.trainable.values()
    )


def by_python(adapter, params, ctx):
    calls.append(1)
    return sizes(adapter, params, ctx) * len(calls)


def mean(adapter, params, ctx):
    return sizes(adapter, params, ctx) / len(adapter.sites)


def half_blind(adapter, params, ctx):
    t = {p: {**t, "a": jax.lax.stop_gradient(t["a"])} for p, t in adapter.trainable.items()}
    return sizes(adapter.replace(trainable=t), params, ctx)


def dense(adapter, params, ctx):
    """The same value by the matrices of the deltas."""
    del params, ctx
    deltas = [t["a"] @ t["b"] for t in adapter.trainable.values()]
    return 0.5 * sum(jnp.sum(d * d) for d in deltas)


calls: list[int] = []
BROKEN = {
    "finite": rooted,
    "positive": below_zero,
    "zero": of_a,
    "jit": by_python,
    "additive": mean,
    "gradient": half_blind,
    "thin": dense,
}


@pytest.mark.parametrize("law", penalty.LAWS)
def test_mutation_a_broken_record_fails_its_law(law):
    calls.clear()
    broken = dataclasses.replace(GOOD, penalty=BROKEN[law])
    assert error(law, broken, world(GOOD)) > TOLERANCE


def test_dense_is_the_same_value_and_breaks_no_other_law():
    """So the law of thin programs sees the program, not the value."""
    other, at = dataclasses.replace(GOOD, penalty=dense), world(GOOD)
    want = penalty.value(GOOD, at.adapter, at.params)
    assert penalty.value(other, at.adapter, at.params) == pytest.approx(want, rel=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
    with pytest.raises(ValueError, match="examples: got none, expected adaptation methods"):
        dataclasses.replace(GOOD, examples=())
    half = dataclasses.replace(GOOD, penalty=lambda *args: sizes(*args).astype(jnp.bfloat16))
    at = world(GOOD)
    with pytest.raises(ValueError, match=r"got \(\) bfloat16, expected a float32 \[\]"):
        penalty.value(half, at.adapter, at.params)
