"""Every initialisation obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import numerics, registry
from jlora.contracts import initialisation
from jlora.contracts.initialisation import Initialisation, error, gathered, laws_of, run, world
from jlora.core.init import key_of
from jlora.core.lift import flatten
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.low_rank.pissa import PiSSA

RECORDS = {
    p.system.name: p.system for p in registry.systems() if isinstance(p.system, Initialisation)
}
TRIALS = [(name, law) for name, record in RECORDS.items() for law in laws_of(record)]
TOLERANCE = 2e-5


def test_every_system_of_the_room_has_the_contract():
    room = {p.system.name for p in registry.systems() if p.family == "inits"}
    assert room and room == RECORDS.keys()


@pytest.mark.parametrize(("name", "law"), TRIALS)
def test_law(name, law):
    record = RECORDS[name]
    found = error(law, record, world(record))
    assert (found > TOLERANCE) if law in record.breaks else (found <= TOLERANCE), found


# --- three that are right: one of inputs, one of gradients, one that is random -------------------


def zeros(adapter):
    """Second moments of the inputs, [*stack, d_in, d_in]."""
    return {s.path: jnp.zeros((*s.stack, s.d_in, s.d_in)) for s, _ in adapter.sites}


def moments(statistics, batch):
    return {p: s + numerics.matmul(batch[p].mT, batch[p]) for p, s in statistics.items()}


def set_a(adapter, values):
    new = {p: {**t, "a": values[p]} for p, t in adapter.trainable.items()}
    return adapter.replace(trainable=new)


def principal_inputs(key, adapter, params, statistics):
    """a: the two directions in which the inputs are largest; b stays 0."""
    top = {p: jnp.flip(numerics.eigh(s)[1], -1)[..., :2] for p, s in statistics.items()}
    return set_a(adapter, top)


def no_gradients(adapter):
    return {s.path: jnp.zeros((*s.stack, s.d_in, s.d_out)) for s, _ in adapter.sites}


def add(statistics, batch):
    return jax.tree.map(jnp.add, statistics, dict(batch))


def singular(key, adapter, params, statistics):
    """a, a0: left singular vectors of the gradient; b, b0: the right ones."""
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for p, g in statistics.items():
        u, _, vt = numerics.svd(g)
        a, b = u[..., :2], vt[..., :2, :]
        trainable[p], frozen[p] = {"a": a, "b": b}, {**frozen[p], "a0": a, "b0": b}
    return adapter.replace(trainable=trainable, frozen=frozen)


def normal(key, adapter, params, statistics):
    shapes = {p: t["a"].shape for p, t in adapter.trainable.items()}
    return set_a(adapter, {p: jax.random.normal(key_of(key, p), s) for p, s in shapes.items()})


COMMON = {"paper": "-", "symbol": "-", "evidence": "-"}
INPUTS = Initialisation(
    name="inputs", method=LoRA(rank=2), needs="inputs", start=zeros, gather=moments,
    initialise=principal_inputs, **COMMON,
)  # fmt: skip
GRADIENTS = Initialisation(
    name="gradients", method=PiSSA(rank=2), needs="gradients", start=no_gradients, gather=add,
    initialise=singular, **COMMON,
)  # fmt: skip
RANDOM = Initialisation(
    name="random", method=LoRA(rank=2), initialise=normal, random=True, **COMMON
)
PISSA = RECORDS["PiSSA initialisation"]
RIGHT = [(r, law) for r in (INPUTS, GRADIENTS, RANDOM) for law in laws_of(r)]


@pytest.mark.parametrize(("record", "law"), RIGHT, ids=lambda v: getattr(v, "name", v))
def test_what_needs_data_or_chance_obeys(record, law):
    assert error(law, record, world(record)) <= TOLERANCE


def test_the_data_reach_the_initialisation():
    """The doubles are no straw men: other data give other values."""
    for record in (INPUTS, GRADIENTS):
        at = world(record)
        other = at._replace(batches=world(record, seed=1).batches)
        a, b = (np.asarray(run(record, w).trainable["head"]["a"]) for w in (at, other))
        assert np.max(np.abs(a - b)) > 0.1


# --- one that is wrong for every law -------------------------------------------------------------


def b_of_ones(key, adapter, params, statistics):
    new = {p: {**t, "b": jnp.ones_like(t["b"])} for p, t in adapter.trainable.items()}
    return adapter.replace(trainable=new)


def other_dtype(key, adapter, params, statistics):
    return jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter)


def one_leaf_more(key, adapter, params, statistics):
    new = {p: {**t, "seen": jnp.ones(())} for p, t in adapter.trainable.items()}
    return adapter.replace(trainable=new)


def other_rank(key, adapter, params, statistics):
    return set_a(adapter, {p: t["a"][..., :1] for p, t in adapter.trainable.items()})


def edits_the_base(key, adapter, params, statistics):
    params["head"] = params["head"] * 0.5
    return adapter


def gives_the_base_away(key, adapter, params, statistics):
    if params["head"] is not kept[0]["head"]:  # a copy: the world's own is needed again
        params["head"].delete()
    return adapter


def the_last_batch(statistics, batch):
    return moments(jax.tree.map(jnp.zeros_like, statistics), batch)


def sum_of_means(statistics, batch):
    return moments(statistics, {p: x / np.sqrt(x.shape[-2]).item() for p, x in batch.items()})


def forgets(statistics, batch):
    return {p: 0.5 * s + batch[p] for p, s in statistics.items()}


def by_calls(key, adapter, params, statistics):
    calls.append(1)
    return normal(jax.random.key(len(calls)), adapter, params, statistics)


def all_layers_at_once(key, adapter, params, statistics):
    one = {p: s.mean(0, keepdims=True) if s.ndim == 3 else s for p, s in statistics.items()}
    same = {p: jnp.broadcast_to(s, statistics[p].shape) for p, s in one.items()}
    return principal_inputs(key, adapter, params, same)


def without_a_name(key, adapter, params, statistics):
    if any(isinstance(w, jax.ShapeDtypeStruct) for w in jax.tree.leaves(params)):
        raise ValueError("a weight is abstract")
    return PISSA.initialise(key, adapter, params, statistics)


def left_to_jax(key, adapter, params, statistics):
    norm = {p: jnp.linalg.norm(w) for p, w in flatten(params)[0].items()}
    return set_a(adapter, {p: t["a"] * norm[p] for p, t in adapter.trainable.items()})


calls: list[int] = []
kept: list = [None]
BROKEN = [
    ("identity", INPUTS, {"initialise": b_of_ones}),
    ("tree", INPUTS, {"initialise": other_dtype}),
    ("tree", INPUTS, {"initialise": one_leaf_more}),
    ("tree", INPUTS, {"initialise": other_rank}),
    ("base", INPUTS, {"initialise": edits_the_base}),
    ("base", INPUTS, {"initialise": gives_the_base_away}),
    ("stream", INPUTS, {"gather": the_last_batch}),
    ("stream", INPUTS, {"gather": sum_of_means}),
    (
        "stream",
        GRADIENTS,
        {"gather": forgets},
    ),
    ("key", RANDOM, {"initialise": by_calls}),
    ("key", RANDOM, {"random": False}),
    ("stacked", INPUTS, {"initialise": all_layers_at_once}),
    ("abstract", PISSA, {"initialise": without_a_name}),
    ("abstract", PISSA, {"reads_weights": False}),
    ("abstract", RANDOM, {"reads_weights": True}),
    ("abstract", INPUTS, {"initialise": left_to_jax}),
]


@pytest.mark.parametrize(("law", "record", "wrong"), BROKEN)
def test_mutation_a_broken_record_fails_its_law(law, record, wrong):
    calls.clear()
    at = world(record)
    kept[0] = at.params
    assert error(law, dataclasses.replace(record, **wrong), at) > TOLERANCE


def test_every_law_has_a_broken_record():
    assert {law for law, *_ in BROKEN} == set(initialisation.LAWS) == set(initialisation.CHECKS)


def test_a_start_elsewhere_is_a_named_exception():
    elsewhere = dataclasses.replace(
        INPUTS, initialise=b_of_ones, breaks={"identity": "starts from a sum"}
    )
    assert error("identity", elsewhere, world(elsewhere)) > TOLERANCE
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(INPUTS, breaks={"luck": "?"})
    with pytest.raises(ValueError, match="needs: got 'labels', expected one of"):
        dataclasses.replace(INPUTS, needs="labels")


def test_statistics_are_those_of_all_data():
    """Against numpy in float64."""
    at = world(INPUTS)
    got = gathered(INPUTS, at.adapter, at.batches)["layers/up"]
    x = np.concatenate([np.asarray(b["layers/up"], "f8") for b in at.batches], axis=1)
    np.testing.assert_allclose(got, x.transpose(0, 2, 1) @ x, rtol=1e-5, atol=1e-5)
