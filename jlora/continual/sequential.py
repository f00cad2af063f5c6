r"""Sequential fine-tuning: one adapter, trained on one task after the other. The lower bound.

=====  ==============================
A_k    the adapter after task k
=====  ==============================

.. math:: A_k = \mathrm{train}_k(A_{k-1}), \qquad S(t) = A_k \;\text{for all}\; t \le k

Nothing keeps it from forgetting: every system of this room is compared with it.

Paper: none; the baseline of all continual learning.
Deviates: nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jlora.contracts.stream import Stream, seen
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.lora import LoRA


class Sequential(NamedTuple):
    """The state of the stream."""

    latest: Adapter  # trained on all tasks so far
    count: Int[Array, ""]  # how many


def init(fresh: Adapter) -> Sequential:
    """The state before the first task.

    Args:
      fresh: an adapter of `jl.init`.

    Returns:
      The state without tasks.
    """
    return Sequential(fresh, jnp.zeros((), jnp.int32))


def start(key: PRNGKeyArray, state: Sequential) -> Adapter:
    """The adapter as it is.

    Args:
      key: not used.
      state: after the tasks so far.

    Returns:
      The latest adapter.
    """
    del key
    return state.latest


def update(state: Sequential, trained: Adapter) -> Sequential:
    """The state after one more task.

    Args:
      state: before it.
      trained: the adapter after it.

    Returns:
      The state with one more task.
    """
    return Sequential(trained, state.count + 1)


def adapter(state: Sequential, task: int) -> Adapter:
    """The latest adapter, for every task.

    Args:
      state: after the tasks so far.
      task: one of them.

    Returns:
      The same for all tasks.

    Raises:
      IndexError: the task has not come.
    """
    seen(task, int(state.count))
    return state.latest


SYSTEM = Stream(
    name="Sequential fine-tuning",
    paper="none (baseline)",
    symbol="Sequential",
    evidence="forgets a task that a later one contradicts",
    kind="component",
    examples=(LoRA(rank=2),),
    init=init,
    start=start,
    update=update,
    adapter=adapter,
)
