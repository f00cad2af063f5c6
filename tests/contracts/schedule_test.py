"""Every schedule obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora import registry
from jlora.contracts.schedule import LAWS, Schedule
from jlora.contracts.schedule_laws import error, world

TOLERANCE = 1e-4
RANK, LENGTH = 4, 4


# A schedule after AdaLoRA's allocator: the ranks of all sites compete for one budget.


def start(adapter):
    return {site.path: jnp.zeros(RANK, jnp.float32) for site, _ in adapter.sites}


def observe(state, adapter, gradients):
    """A running mean of |w g|, summed over both factors of a rank."""

    def score(path):
        t, g = adapter.trainable[path], gradients[path]
        return jnp.abs(t["a"] * g["a"]).sum(0) + jnp.abs(t["b"] * g["b"]).sum(1)

    return {p: 0.7 * s + 0.3 * score(p) for p, s in state.items()}


def allowed(step):
    """From all 8 ranks to 3, linear."""
    return jnp.round(8 - 5 * jnp.clip(step / LENGTH, 0, 1)).astype(jnp.int32)


def best(state, count):
    scores = jnp.stack(list(state.values()))
    order = jnp.argsort(jnp.argsort(-scores.ravel())).reshape(scores.shape)
    return dict(zip(state, order < count, strict=True))


def masks(state, step):
    return best(state, allowed(step))


def changed(adapter, change):
    trainable = {p: change(p, t) for p, t in adapter.trainable.items()}
    return adapter.replace(trainable=trainable)


def mask(adapter, masks):
    """b alone is set to zero: a stays, so b has a gradient."""
    return changed(adapter, lambda p, t: {**t, "b": jnp.where(masks[p][:, None], t["b"], 0.0)})


def shrink(adapter, state, masks):
    kept = {p: np.flatnonzero(np.asarray(m)) for p, m in masks.items()}

    def cut(tree):
        return {p: {"a": t["a"][:, kept[p]], "b": t["b"][kept[p]]} for p, t in tree.items()}

    adam = state[0]._replace(mu=cut(state[0].mu), nu=cut(state[0].nu))
    sites = tuple(
        (site, dataclasses.replace(method, rank=len(kept[site.path])))
        for site, method in adapter.sites
    )
    return adapter.replace(trainable=cut(adapter.trainable), sites=sites), (adam, *state[1:])


GOOD = Schedule(
    name="one budget",
    paper="-",
    symbol="-",
    evidence="-",
    examples=(jl.LoRA(RANK, alpha=2.0),),
    start=start,
    observe=observe,
    masks=masks,
    mask=mask,
    shrink=shrink,
    budget=lambda adapter, step: round(8 - 5 * min(step / LENGTH, 1)),
    length=LENGTH,
)
FOUND = {p.system.name: p.system for p in registry.systems() if p.family == "schedules"}
RECORDS = FOUND | {GOOD.name: GOOD}
TRIALS = [
    (name, k, law)
    for name, record in RECORDS.items()
    for k in range(len(record.examples))
    for law in LAWS
]


def test_every_schedule_has_the_contract():
    assert FOUND and all(isinstance(r, Schedule) for r in FOUND.values())


@pytest.mark.parametrize(("name", "example", "law"), TRIALS)
def test_law(name, example, law):
    record = RECORDS[name]
    found = error(law, record, world(record, example=example))
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


def first_ones(adapter, state, masks):
    """As many ranks as are kept, but others."""
    return shrink(adapter, state, {p: ~jnp.sort(~m) for p, m in masks.items()})


def forgetful(adapter, state, masks):
    """Moments start again."""
    small, _ = shrink(adapter, state, masks)
    return small, optax.adam(0.01).init(small.trainable)


def both_zero(adapter, masks):
    return changed(mask(adapter, masks), lambda p, t: {**t, "a": jnp.where(masks[p], t["a"], 0.0)})


def by_number(state, step):
    return best(state, int(allowed(step)))


def counting(state, adapter, gradients):
    calls.append(1)
    return observe(jax.tree.map(lambda t: t + len(calls), state), adapter, gradients)


calls: list[int] = []
BROKEN = {
    "shrunk": {"shrink": first_ones},
    "moments": {"shrink": forgetful},
    "revive": {"mask": both_zero},
    "budget": {"masks": lambda state, step: best(state, allowed(step) + 1)},
    "jit": {"masks": by_number},
    "resume": {"observe": counting},
    "restore": {"observe": lambda *args: jax.tree.map(np.asarray, observe(*args))},
}


@pytest.mark.parametrize("law", LAWS)
def test_mutation_a_broken_record_fails_its_law(law):
    calls.clear()
    assert error(law, dataclasses.replace(GOOD, **BROKEN[law]), world(GOOD)) > TOLERANCE


def test_refusals():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
    with pytest.raises(ValueError, match="examples: got none, expected adaptation methods"):
        dataclasses.replace(GOOD, examples=())
    idle = dataclasses.replace(GOOD, masks=lambda state, step: best(state, 8))
    with pytest.raises(ValueError, match=r"one budget: got masks .* expected some True and some"):
        error("shrunk", idle, world(idle))
