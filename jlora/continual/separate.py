r"""One adapter per task, each from the same start: nothing is forgotten, nothing is shared.

=====  ==============================
A_k    the adapter of task k
A_0    the fresh adapter
=====  ==============================

.. math:: A_k = \mathrm{train}_k(A_0), \qquad S(t) = A_t

It must be given the task that an input belongs to, and its memory grows with the tasks: what other
systems of this room save is measured against it.

Paper: none; the other baseline of all continual learning.
Deviates: nothing.
"""

from typing import NamedTuple

from jaxtyping import PRNGKeyArray

from jlora.contracts.stream import Stream, seen
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.lora import LoRA


class Separate(NamedTuple):
    """The state of the stream."""

    fresh: Adapter  # where every task starts
    tasks: tuple[Adapter, ...]  # one per task so far


def init(fresh: Adapter) -> Separate:
    """The state before the first task.

    Args:
      fresh: an adapter of `jl.init`.

    Returns:
      The state without tasks.
    """
    return Separate(fresh, ())


def start(key: PRNGKeyArray, state: Separate) -> Adapter:
    """The fresh adapter.

    Args:
      key: not used.
      state: after the tasks so far.

    Returns:
      The same for every task.
    """
    del key
    return state.fresh


def update(state: Separate, trained: Adapter) -> Separate:
    """The state after one more task.

    Args:
      state: before it.
      trained: its adapter.

    Returns:
      The state with one more task.
    """
    return state._replace(tasks=(*state.tasks, trained))


def adapter(state: Separate, task: int) -> Adapter:
    """The adapter of a task.

    Args:
      state: after the tasks so far.
      task: one of them.

    Returns:
      As it was after its own training.

    Raises:
      IndexError: the task has not come.
    """
    return state.tasks[seen(task, len(state.tasks))]


SYSTEM = Stream(
    name="One adapter per task",
    paper="none (baseline)",
    symbol="Separate",
    evidence="earlier tasks keep every bit",
    kind="component",
    examples=(LoRA(rank=2),),
    breaks={"continues": "every task starts from the base"},
    init=init,
    start=start,
    update=update,
    adapter=adapter,
    kept=True,
)
