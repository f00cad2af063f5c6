"""The laws of streams, measured on a tiny model with two tasks; `stream` says what they are."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.contracts import tiny
from jlora.contracts.distance import gap, same_bits
from jlora.contracts.stream import LAWS, State, Stream
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.types import Dynamic, Tree

TASKS, RATE = 2, 0.2  # of the streams that the laws run, with one step per task


class World(NamedTuple):
    """What the laws are measured on; hashable, so that laws share the streams they run."""

    method: Method  # the adaptation method of all sites
    seed: int = 0


class Data(NamedTuple):
    """The tiny model and a target per task."""

    params: tiny.Params
    fresh: Adapter
    x: Float[Array, "4 3 5"]
    targets: Float[Array, "T 4 3 5"]


@functools.lru_cache(maxsize=4)
def data(at: World) -> Data:
    """Random targets.

    Args:
      at: the method and the seed.

    Returns:
      Model, fresh adapter, inputs and targets.
    """
    p = tiny.params(at.seed)
    targets = jnp.stack([tiny.inputs(4, 100 + at.seed + k) for k in range(TASKS)])
    return Data(p, tiny.fresh(at.method, p), tiny.inputs(4, at.seed), targets)


class Past(NamedTuple):
    """A stream that was run: one entry per task."""

    states: tuple[State, ...]  # before the first task, then after each
    starts: tuple[Adapter, ...]  # from which each task was trained
    trained: tuple[Adapter, ...]


def laws_of(record: Stream) -> tuple[str, ...]:
    """The laws that a system can be asked for.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "kept" of systems that claim it alone.
    """
    return tuple(law for law in LAWS if law != "kept" or record.kept)


def error(law: str, record: Stream, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds, infinity where something is not finite.
    """
    worst = CHECKS[law](record, at)
    return worst if np.isfinite(worst) else float("inf")


@jax.jit
def outputs(params: tiny.Params, adapter: Adapter, x: Float[Array, "4 3 5"]) -> Array:
    """What the tiny model says with an adapter.

    Args:
      params: weights of the base.
      adapter: any of the model.
      x: inputs.

    Returns:
      As x.
    """
    return lift(tiny.model)(params, adapter, x, jnp.zeros(()))


@functools.lru_cache(maxsize=16)
def _slopes(running: Callable[..., Adapter], penalty: Callable[..., Array]) -> Dynamic:
    """Compiled (adapter, state, params, x, target) -> gradients of (loss, penalty)."""

    def loss(trainable: Tree, adapter: Adapter, state: State, *given: Tree) -> Array:
        params, x, target = given
        answer = outputs(params, running(state, adapter.replace(trainable=trainable)), x)
        return jnp.mean((answer - target) ** 2)

    def extra(trainable: Tree, adapter: Adapter, state: State) -> Array:
        return penalty(state, adapter.replace(trainable=trainable))

    @jax.jit
    def both(adapter: Adapter, state: State, params: Tree, x: Array, target: Array) -> Tree:
        t = adapter.trainable
        return (
            jax.grad(loss)(t, adapter, state, params, x, target),
            jax.grad(extra)(t, adapter, state),
        )

    return both


def _gradients(record: Stream, at: World, state: State, adapter: Adapter, k: int) -> Tree:
    """By the loss of task k, and by the penalty."""
    given, sloped = data(at), _slopes(record.running, record.penalty)
    return sloped(adapter, state, given.params, given.x, given.targets[k])


def _fit(record: Stream, at: World, state: State, adapter: Adapter, k: int) -> Adapter:
    """A step on task k."""
    loss, penalty = _gradients(record, at, state, adapter, k)
    moved = jax.tree.map(lambda t, g, h: t - RATE * (g + h), adapter.trainable, loss, penalty)
    return adapter.replace(trainable=moved)


def _key(k: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(7), k)


def run(record: Stream, at: World, state: State | None = None, first: int = 0) -> Past:
    """The stream from task `first` on, which `state` comes before.

    Args:
      record: the system.
      at: what it is run on.
      state: None: that before the first task.
      first: the task that comes next.

    Returns:
      States, starts and trained adapters.
    """
    states = [record.init(data(at).fresh) if state is None else state]
    starts, trained = [], []
    for k in range(first, TASKS):
        starts.append(record.start(_key(k), states[-1]))
        trained.append(_fit(record, at, states[-1], starts[-1], k))
        states.append(record.update(states[-1], trained[-1]))
    return Past(tuple(states), tuple(starts), tuple(trained))


def _says(at: World, adapter: Adapter) -> Array:
    return outputs(data(at).params, adapter, data(at).x)


def _second(record: Stream, at: World) -> tuple[State, Adapter]:
    """The state before the second task, after a first one that moved much, and its start."""
    state = record.init(data(at).fresh)
    state = record.update(state, tiny.moved(record.start(_key(0), state)))
    return state, record.start(_key(1), state)


def identity(record: Stream, at: World) -> float:
    """The first start against the base.

    Args and Returns are those of `error`.
    """
    state, given = record.init(data(at).fresh), data(at)
    adapter = record.running(state, record.start(_key(0), state))
    return gap(_says(at, adapter), tiny.model(given.params, given.x, jnp.zeros(())))


def continues(record: Stream, at: World) -> float:
    """The start of the second task against what serves the first.

    Args and Returns are those of `error`.
    """
    state, adapter = _second(record, at)
    return gap(_says(at, record.running(state, adapter)), _says(at, record.adapter(state, 0)))


def served(record: Stream, at: World) -> float:
    """What serves a task right after it, against what ran in its training.

    Args and Returns are those of `error`.
    """
    past = run(record, at)
    answers = [
        gap(
            _says(at, record.adapter(past.states[k + 1], k)),
            _says(at, record.running(past.states[k], past.trained[k])),
        )
        for k in range(TASKS)
    ]
    return max(answers)


def kept(record: Stream, at: World) -> float:
    """0, or infinity where a bit of what serves an earlier task has changed at the end.

    Args and Returns are those of `error`.
    """
    past = run(record, at)
    for k in range(TASKS - 1):
        then, now = (record.adapter(past.states[n], k) for n in (k + 1, TASKS))
        if not same_bits(now, then):
            return float("inf")
    return 0.0


def unseen(record: Stream, at: World) -> float:
    """0, or infinity where a task that has not come is served.

    Args and Returns are those of `error`.
    """
    state = record.init(data(at).fresh)
    after = record.update(state, record.start(_key(0), state))
    for given, task in ((state, 0), (after, 1), (after, -1)):
        try:
            record.adapter(given, task)
        except IndexError as problem:
            if f"task {task}" in str(problem):
                continue
        return float("inf")
    return 0.0


def gradient(record: Stream, at: World) -> float:
    """0, or infinity where a gradient of task 1 is not finite, or that of its loss is zero.

    Args and Returns are those of `error`.
    """
    state, adapter = _second(record, at)
    for given in (adapter, tiny.moved(adapter)):
        gradients = _gradients(record, at, state, given, 1)
        loss, penalty = ([np.asarray(t) for t in jax.tree.leaves(part)] for part in gradients)
        if not all(np.isfinite(t).all() for t in (*loss, *penalty)):
            return float("inf")
        if not any(t.any() for t in loss):
            return float("inf")
    return 0.0


def resume(record: Stream, at: World) -> float:
    """0, or infinity where the task after a saved state ends with other bits.

    Args and Returns are those of `error`.
    """
    past = run(record, at)
    leaves, form = jax.tree.flatten(past.states[1])
    if not all(isinstance(t, jax.Array) for t in leaves):
        return float("inf")
    read = jax.tree.unflatten(form, [jnp.asarray(np.array(t)) for t in leaves])
    again = run(record, at, read, 1)
    return 0.0 if same_bits(again.states[-1], past.states[-1]) else float("inf")


def jit(record: Stream, at: World) -> float:
    """Jitted against eager, in the second task.

    Args and Returns are those of `error`.
    """
    state, adapter = _second(record, at)

    def both(state: State, adapter: Adapter) -> tuple[Tree, Array]:
        return record.running(state, adapter), record.penalty(state, adapter)

    adapter = tiny.moved(adapter, 1)
    return gap(jax.jit(both)(state, adapter), both(state, adapter))


CHECKS: Mapping[str, Callable[[Stream, World], float]] = {
    "identity": identity,
    "continues": continues,
    "served": served,
    "kept": kept,
    "unseen": unseen,
    "gradient": gradient,
    "resume": resume,
    "jit": jit,
}
