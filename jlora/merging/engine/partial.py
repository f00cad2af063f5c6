"""A rule of a merge as a PyTree: its arrays are leaves, so `jit` returns and takes it.

Reference: `jax.tree_util.Partial`.
Deviates: static options are part of it, so that equal rules are equal to jit.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax import Array
from jaxtyping import Float

from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function with its static options; two of the same are equal, so jit knows them again."""

    function: Callable[..., Dynamic]
    static: tuple[tuple[str, Dynamic], ...]  # sorted (name, value), hashable

    def __call__(self, *args: Dynamic) -> Dynamic:
        return self.function(*args, **dict(self.static))


def partial(
    function: Callable[..., Float[Array, "b d_out"]], *arrays: Dynamic, **static: Dynamic
) -> Dynamic:
    """`function(*arrays, deltas, numbers, **static)` as a function of the last two.

    Args:
      function: of a module's top level; rows of its result depend on rows of the deltas alone.
      arrays: PyTrees, traced or not.
      static: hashable options.

    Returns:
      A PyTree whose leaves are `arrays`, unlike a closure: what a rule reads of the whole bank
      (thresholds) leaves `jit` with it, and is not computed again for each block of rows.
    """
    return jax.tree_util.Partial(Bound(function, tuple(sorted(static.items()))), *arrays)
