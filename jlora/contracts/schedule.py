r"""Schedules of ranks: which ranks of which site count at a step, and what becomes of the others.

=========  =====================================================================================
m          masks, path of a site -> bool [R]: which of its ranks are kept
=========  =====================================================================================

A system gives functions of a state of its own, a PyTree of arrays:

- ``start(adapter) -> state`` and ``observe(state, adapter, gradients) -> state``, once per step;
- ``masks(state, step) -> m``, under jit: shapes stay, values change;
- ``mask(adapter, m) -> adapter`` of the same shapes, in which dropped ranks add nothing to a delta;
- ``shrink(adapter, optimizer_state, m) -> (adapter, optimizer_state)`` between two phases: smaller
  arrays, for masks that are numbers;
- ``budget(adapter, step) -> int``: how many ranks all sites may keep together.

Laws, each an error, relative where it compares arrays, 0 where it holds:

=========  =====================================================================================
shrunk     masked and shrunk adapters have the same deltas, and kept ranks the same gradients
moments    shrinking keeps the optimizer's moments of kept ranks, bit for bit
revive     a dropped rank has a gradient that is not zero on one factor, so it can come back
budget     no step keeps more ranks than its budget
jit        jitted is eager, and masks of other steps compile nothing new
resume     from the state of any step, what follows is what followed, bit for bit
restore    the state is arrays, of a form that stays, which Orbax gives back bit for bit
=========  =====================================================================================
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax

from jlora.core.adapter import Adapter
from jlora.core.site import Arrays
from jlora.system import System
from jlora.types import Dynamic, Tree

LAWS = ("shrunk", "moments", "revive", "budget", "jit", "resume", "restore")

Masks = dict[str, jax.Array]  # path -> bool [R]
Trainable = dict[str, Arrays]  # path -> name -> array


def unchanged(state: Tree, adapter: Adapter, gradients: Trainable) -> Tree:
    """The `observe` of a schedule that looks at nothing.

    Args:
      state: of the schedule.
      adapter: not read.
      gradients: not read.

    Returns:
      The state.
    """
    del adapter, gradients
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(System):
    """The record of a schedule; `examples` are the adaptation methods, of rank R, it is tried on.

    Attributes:
      start: adapter -> state.
      masks: (state, step int32 []) -> masks.
      mask: (adapter, masks) -> adapter of the same shapes.
      shrink: (adapter, optax state of its trainable, masks) -> both with the kept ranks alone.
      budget: (adapter, step) -> ranks that all sites may keep together.
      length: steps after which nothing changes any more; some ranks are dropped by then.
      observe: (state, adapter, gradients like its trainable) -> state.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/schedule_test.py",)

    start: Callable[[Adapter], Tree]
    masks: Callable[[Tree, Dynamic], Masks]
    mask: Callable[[Adapter, Masks], Adapter]
    shrink: Callable[[Adapter, Tree, Masks], tuple[Adapter, Tree]]
    budget: Callable[[Adapter, int], int]
    length: int
    observe: Callable[[Tree, Adapter, Trainable], Tree] = unchanged

    def __post_init__(self):
        System.__post_init__(self)
        if not self.examples:
            raise ValueError(f"{self.name}: examples: got none, expected adaptation methods")
