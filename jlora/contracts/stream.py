r"""Streams: tasks that come one after the other, and what is served for each of them so far.

=========  =====================================================================================
A_k        the adapter that was trained on task k, the k-th to come
s_k        state after task k, a PyTree of adapters; s_0 before the first
S(s, t)    the adapter that serves task t < k
=========  =====================================================================================

A system gives functions of a state of its own:

- ``init(fresh) -> s_0``, of an adapter of `jl.init` that changes nothing;
- ``start(key, s) -> A``, from which the training on the next task starts;
- ``running(s, A) -> adapter`` that the model runs with in that training;
- ``penalty(s, A) -> []``, added to the loss of the task;
- ``update(s, A) -> s'`` with the trained A;
- ``adapter(s, t) -> adapter``, what serves task t afterwards.

Gradients are taken by `A.trainable` alone, so that nothing of the state is trained by accident.
`jlora.continual.matrix` runs a stream and says how much of each task it forgets.

Laws, each an error relative to the largest output, 0 where it holds:

===========  ===============================================================================
identity     the first task starts from the base
continues    a task starts from what serves the task before it
served       after a task its adapter does what the model did in training
kept         later tasks change no bit of what serves earlier ones (systems that claim it)
unseen       a task that has not come is an error that names it
gradient     loss and penalty have finite gradients, that of the loss not zero
resume       from a state that was saved and read, what follows is the same, bit for bit
jit          running adapter and penalty, jitted, are those of eager
===========  ===============================================================================
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.contracts import tiny
from jlora.contracts.distance import gap, same_bits
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.system import System

LAWS = ("identity", "continues", "served", "kept", "unseen", "gradient", "resume", "jit")
TASKS, RATE = 2, 0.2  # of the streams that the laws run, with one step per task

State = Any  # a PyTree of arrays


def itself(state: State, adapter: Adapter) -> Adapter:
    """The `running` of a system that trains one adapter and nothing next to it.

    Args:
      state: not read.
      adapter: in training.
    """
    del state
    return adapter


def nothing(state: State, adapter: Adapter) -> Float[Array, ""]:
    """The `penalty` of a system that has none.

    Args:
      state: not read.
      adapter: not read.
    """
    del state, adapter
    return jnp.zeros((), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream(System):
    """The record of a stream; `examples` are the adaptation methods that it is tried on.

    Attributes:
      init: fresh adapter -> state before the first task.
      start: (key, state) -> adapter from which the next task is trained.
      update: (state, trained adapter) -> state.
      adapter: (state, task) -> adapter that serves the task.
      running: (state, adapter in training) -> adapter that the model runs with.
      penalty: (state, adapter in training) -> scalar that is added to the loss.
      kept: whether later tasks are claimed to change nothing for earlier ones.
    """

    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/stream_test.py",)

    init: Callable[[Adapter], State]
    start: Callable[[PRNGKeyArray, State], Adapter]
    update: Callable[[State, Adapter], State]
    adapter: Callable[[State, int], Adapter]
    running: Callable[[State, Adapter], Adapter] = itself
    penalty: Callable[[State, Adapter], Array] = nothing
    kept: bool = False

    def __post_init__(self):
        System.__post_init__(self)
        for law in self.breaks.keys() - set(LAWS):
            raise ValueError(f"{self.name}: breaks: got {law!r}, expected one of {LAWS}")
        if not self.examples:
            raise ValueError(f"{self.name}: examples: got none, expected adaptation methods")


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
    """
    p = tiny.params(at.seed)
    targets = jnp.stack([tiny.inputs(4, 100 + at.seed + k) for k in range(TASKS)])
    return Data(p, tiny.fresh(at.method, p), tiny.inputs(4, at.seed), targets)


def seen(task: int, count: int) -> int:
    """The task itself.

    Args:
      task: asked for.
      count: how many tasks have come.

    Raises:
      IndexError: it is none of them.
    """
    if not 0 <= task < count:
        raise IndexError(f"task {task}: got {count} tasks so far, expected one of them")
    return task


class Past(NamedTuple):
    """A stream that was run: one entry per task."""

    states: tuple[State, ...]  # before the first task, then after each
    starts: tuple[Adapter, ...]  # from which each task was trained
    trained: tuple[Adapter, ...]


def laws_of(record: Stream) -> tuple[str, ...]:
    """The laws that a system can be asked for."""
    return tuple(law for law in LAWS if law != "kept" or record.kept)


def error(law: str, record: Stream, at: World) -> float:
    """The error of a law; 0 where it holds, infinity where something is not finite."""
    found = CHECKS[law](record, at)
    return found if np.isfinite(found) else float("inf")


@jax.jit
def outputs(params: tiny.Params, adapter: Adapter, x: Float[Array, "4 3 5"]) -> Array:
    """What the tiny model says with an adapter.

    Args:
      params: weights of the base.
      adapter: any of the model.
      x: inputs.
    """
    return lift(tiny.model)(params, adapter, x, jnp.zeros(()))


@functools.lru_cache(maxsize=16)
def _slopes(running: Callable[..., Adapter], penalty: Callable[..., Array]) -> Any:
    """Compiled (adapter, state, params, x, target) -> gradients of (loss, penalty)."""

    def loss(trainable: Any, adapter: Adapter, state: State, *given: Any) -> Array:
        params, x, target = given
        found = outputs(params, running(state, adapter.replace(trainable=trainable)), x)
        return jnp.mean((found - target) ** 2)

    def extra(trainable: Any, adapter: Adapter, state: State) -> Array:
        return penalty(state, adapter.replace(trainable=trainable))

    @jax.jit
    def both(adapter: Adapter, state: State, params: Any, x: Array, target: Array) -> Any:
        t = adapter.trainable
        return (
            jax.grad(loss)(t, adapter, state, params, x, target),
            jax.grad(extra)(t, adapter, state),
        )

    return both


def _gradients(record: Stream, at: World, state: State, adapter: Adapter, k: int) -> Any:
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
    """The first start against the base."""
    state, given = record.init(data(at).fresh), data(at)
    adapter = record.running(state, record.start(_key(0), state))
    return gap(_says(at, adapter), tiny.model(given.params, given.x, jnp.zeros(())))


def continues(record: Stream, at: World) -> float:
    """The start of the second task against what serves the first."""
    state, adapter = _second(record, at)
    return gap(_says(at, record.running(state, adapter)), _says(at, record.adapter(state, 0)))


def served(record: Stream, at: World) -> float:
    """What serves a task right after it, against what ran in its training."""
    past = run(record, at)
    found = [
        gap(
            _says(at, record.adapter(past.states[k + 1], k)),
            _says(at, record.running(past.states[k], past.trained[k])),
        )
        for k in range(TASKS)
    ]
    return max(found)


def kept(record: Stream, at: World) -> float:
    """0, or infinity where a bit of what serves an earlier task has changed at the end."""
    past = run(record, at)
    for k in range(TASKS - 1):
        then, now = (record.adapter(past.states[n], k) for n in (k + 1, TASKS))
        if not same_bits(now, then):
            return float("inf")
    return 0.0


def unseen(record: Stream, at: World) -> float:
    """0, or infinity where a task that has not come is served."""
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
    """0, or infinity where a gradient of task 1 is not finite, or that of its loss is zero."""
    state, adapter = _second(record, at)
    for given in (adapter, tiny.moved(adapter)):
        found = _gradients(record, at, state, given, 1)
        loss, penalty = ([np.asarray(t) for t in jax.tree.leaves(part)] for part in found)
        if not all(np.isfinite(t).all() for t in (*loss, *penalty)):
            return float("inf")
        if not any(t.any() for t in loss):
            return float("inf")
    return 0.0


def resume(record: Stream, at: World) -> float:
    """0, or infinity where the task after a saved state ends with other bits."""
    past = run(record, at)
    leaves, form = jax.tree.flatten(past.states[1])
    if not all(isinstance(t, jax.Array) for t in leaves):
        return float("inf")
    read = jax.tree.unflatten(form, [jnp.asarray(np.array(t)) for t in leaves])
    again = run(record, at, read, 1)
    return 0.0 if same_bits(again.states[-1], past.states[-1]) else float("inf")


def jit(record: Stream, at: World) -> float:
    """Jitted against eager, in the second task."""
    state, adapter = _second(record, at)

    def both(state: State, adapter: Adapter) -> tuple[Any, Array]:
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
