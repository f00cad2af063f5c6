"""How far two trees of arrays are apart: what the laws of the contracts measure."""

import jax
import numpy as np

from jlora.types import Dynamic, Tree


def gap(a: Tree, b: Tree) -> float:
    """The largest difference between two trees, relative to the largest entry of each array.

    Args:
      a: a PyTree of arrays; compared in float64.
      b: another one; where an array of it is all zero, the difference counts as it is.

    Returns:
      0 for equal trees; infinity for other structures or shapes and for what is not finite.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, "f8"), np.asarray(y, "f8")
        if x.shape != y.shape:
            return float("inf")
        distance = np.max(np.abs(x - y), initial=0.0) / (np.max(np.abs(y), initial=0.0) or 1.0)
        worst = max(worst, float(distance)) if np.isfinite(distance) else float("inf")
    return worst


def same_bits(a: Tree, b: Tree) -> bool:
    """Whether two trees are the same, bit for bit.

    Args:
      a: a PyTree of arrays.
      b: another one.

    Returns:
      True where structures are equal, and every array has the same dtype, shape and bytes.
    """

    def bits(tree: Tree) -> list[tuple[Dynamic, tuple[int, ...], bytes]]:
        return [(t.dtype, t.shape, np.asarray(t).tobytes()) for t in jax.tree.leaves(tree)]

    return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)
