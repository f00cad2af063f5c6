"""Every optimizer obeys the laws of its kind, and every law can be seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora import registry
from jlora.contracts.optimizer import LAWS, Optimizer, only
from jlora.contracts.optimizer_laws import deltas, error, laws_of, steps, world

TOLERANCE = 2e-4


def stateless(change):
    """A transformation (gradients, params, frozen) -> updates."""

    def update(g, state, params=None, *, frozen, **_):
        return change(g, params, frozen), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scaled(g, params, frozen):
    """Gradients preconditioned by the other factor: -lr g_A (B B^T)^-1 / s^2, and so for B."""

    def site(path, t):
        p, s = params[path], frozen[path]["scale"][..., None, None].astype(t["a"].dtype)
        form = jnp.float32  # bfloat16 has no solve
        left, right = (p["a"].mT @ p["a"]).astype(form), (p["b"] @ p["b"].mT).astype(form)
        a = jnp.linalg.solve(right, t["a"].mT.astype(form)).mT.astype(t["a"].dtype)
        b = jnp.linalg.solve(left, t["b"].astype(form)).astype(t["b"].dtype)
        return {"a": -0.05 * a / s**2, "b": -0.05 * b / s**2}

    return {path: site(path, t) for path, t in g.items() if jax.tree.leaves(t)} | {
        path: t for path, t in g.items() if not jax.tree.leaves(t)
    }


def record(name, make, **fields):
    return Optimizer(name=name, paper="-", symbol="-", evidence="-", make=make, **fields)


ADAM = record("Adam", lambda: optax.adam(0.05))
SCALED = record("scaled gradient", lambda: stateless(scaled), gauge=True)

OTHERS = {"GLAD": "gives a gradient to any optimizer: no update and no state of its own"}
ROOM = {p.system.name: p.system for p in registry.systems() if p.family == "optimizers"}
FOUND = {name: r for name, r in ROOM.items() if name not in OTHERS}
RECORDS = FOUND | {r.name: r for r in (ADAM, SCALED)}
TRIALS = [(name, law) for name, r in RECORDS.items() for law in laws_of(r)]


def test_every_optimizer_has_the_contract():
    assert FOUND and all(isinstance(r, Optimizer) for r in FOUND.values())
    assert not any(isinstance(ROOM[name], Optimizer) for name in OTHERS)


@pytest.mark.parametrize(("name", "law"), TRIALS)
def test_law(name, law):
    found = error(law, RECORDS[name], world())
    assert (found > TOLERANCE) if law in RECORDS[name].breaks else (found <= TOLERANCE), found


def test_the_gauge_is_seen_in_adam_and_in_plain_descent():
    """Adam, and descent along the gradients as they are, depend on the gauge; so does LoRA+."""
    sgd = record("SGD", lambda: optax.sgd(0.05))
    for r in (ADAM, sgd, FOUND["LoRA+"]):
        assert not r.gauge and error("gauge", r, world()) > 0.05


def test_the_scale_is_needed_for_a_step_of_d_that_does_not_depend_on_it():
    """s and A -> s / 4 and 4 A is one delta: the update of D is the same only if s is seen."""
    at = world()
    other = at._replace(
        frozen=jax.tree.map(lambda s: s / 4, at.frozen),
        trainable={p: {**t, "a": 4 * t["a"]} for p, t in at.trainable.items()},
    )
    rule, moved = stateless(scaled), []
    for w in (at, other):
        end = steps(rule.update, rule.init(w.trainable), w)[2]
        moved.append(deltas(end.trainable, w.frozen))
    for x, y in zip(*map(jax.tree.leaves, moved), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_only_trains_what_it_names():
    at = world()
    rule = only(optax.sgd(1.0), ("up",))
    updates, _ = rule.update(at.trainable, rule.init(at.trainable), at.trainable)
    np.testing.assert_array_equal(updates["up"]["a"], -at.trainable["up"]["a"])
    assert not np.any(updates["down"]["a"]) and not np.any(updates["down"]["b"])


def plain(g, params, frozen):
    del params, frozen
    return jax.tree.map(lambda t: -0.1 * t, g)


GOOD = record("good", lambda: stateless(scaled), gauge=True)


def counted():
    """A Python number for a state."""
    return optax.GradientTransformation(lambda p: 0, lambda g, s, p=None: (g, s + 1))


def by_number_of_sites(g, params, frozen):
    return jax.tree.map(lambda t: t / len(g), plain(g, params, frozen))


def decayed(g, params, frozen):
    return jax.tree.map(lambda u, p: u - 0.1 * p, plain(g, params, frozen), params)


def widened(g, params, frozen):
    return jax.tree.map(lambda t: t.astype(jnp.float32), plain(g, params, frozen))


def by_python(g, params, frozen):
    calls.append(1)
    return jax.tree.map(lambda t: t * len(calls), plain(g, params, frozen))


def first_doubled(g, params, frozen):
    return {**g, min(g): jax.tree.map(lambda t: 2 * t, g[min(g)])}


def normalised(g, params, frozen):
    return jax.tree.map(lambda t: t / jnp.linalg.norm(t.ravel()), g)


@jax.custom_batching.custom_vmap
def identity(t):
    return t


@identity.def_vmap
def _(size, batched, t):
    return 2 * t, True


calls: list[int] = []
BROKEN = {
    "restore": counted,
    "masked": lambda: stateless(by_number_of_sites),
    "zero": lambda: stateless(decayed),
    "dtype": lambda: stateless(widened),
    "jit": lambda: stateless(by_python),
    "names": lambda: stateless(first_doubled),
    "gauge": lambda: stateless(plain),
    "stack": lambda: stateless(normalised),
    "bank": lambda: stateless(lambda g, p, f: jax.tree.map(identity, g)),
}


@pytest.mark.parametrize("law", LAWS)
def test_mutation_a_broken_record_fails_its_law(law):
    calls.clear()
    assert error(law, dataclasses.replace(GOOD, make=BROKEN[law]), world()) > TOLERANCE


def test_a_state_that_grows_is_seen():
    """All of it arrays, one more with every step."""
    growing = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, (*s, g)))
    assert error("restore", dataclasses.replace(GOOD, make=lambda: growing), world()) > TOLERANCE


def test_a_law_that_does_not_exist_cannot_be_broken():
    with pytest.raises(ValueError, match="breaks: got 'luck', expected one of"):
        dataclasses.replace(GOOD, breaks={"luck": "?"})
