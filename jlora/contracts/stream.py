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
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.system import System
from jlora.types import Tree

LAWS = ("identity", "continues", "served", "kept", "unseen", "gradient", "resume", "jit")

State = Tree  # of arrays


def itself(state: State, adapter: Adapter) -> Adapter:
    """The `running` of a system that trains one adapter and nothing next to it.

    Args:
      state: not read.
      adapter: in training.

    Returns:
      The adapter in training.
    """
    del state
    return adapter


def nothing(state: State, adapter: Adapter) -> Float[Array, ""]:
    """The `penalty` of a system that has none.

    Args:
      state: not read.
      adapter: not read.

    Returns:
      0.
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

    laws: ClassVar[tuple[str, ...]] = LAWS
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
        if not self.examples:
            raise ValueError(f"{self.name}: examples: got none, expected adaptation methods")


def seen(task: int, count: int) -> int:
    """A task that has come.

    Args:
      task: asked for.
      count: how many tasks have come.

    Returns:
      The task.

    Raises:
      IndexError: it is none of them.
    """
    if not 0 <= task < count:
        raise IndexError(f"task {task}: got {count} tasks so far, expected one of them")
    return task
