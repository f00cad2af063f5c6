"""What the laws of merging are measured on, and how results are compared: densely, in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jlora.algebra import Deltas
from jlora.merging.engine.run import apply
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic

Errors = dict[str, float]  # path -> error


class World(NamedTuple):
    """The inputs that the laws are measured on."""

    bank: Deltas  # N >= 3 adapters
    weights: Array  # [N], all different, summing to 1
    key: Array  # of randomised methods, and of the gauge
    mesh: Mesh | None = None  # axes "d" (divides d_in, d_out) and "s" (divides the stack, if any)


def merged(
    row: Merging,
    world: World,
    bank: Deltas | None = None,
    weights: Dynamic = None,
    ids: Dynamic = None,
    jit: bool = True,
) -> Deltas:
    """A merge of the world's adapters, or of others.

    Args:
      row: the method; it is run with its own options.
      world: key, and what is not given.
      bank: the adapters; None: the world's.
      weights: [N]; None: the world's.
      ids: [N], of the adapters in the keys of a randomised method; None: their positions.
      jit: whether to compile.

    Returns:
      The merged deltas.
    """
    bank = world.bank if bank is None else bank
    w = world.weights if weights is None else jnp.asarray(weights, world.weights.dtype)
    key = world.key if row.randomised else None
    ids = jnp.arange(w.shape[0], dtype=jnp.uint32) if ids is None else jnp.asarray(ids)
    extra = {"ids": ids} if row.randomised else {}
    return apply(row, bank, w, row.options, key=key, jit=jit, **extra)


def take(bank: Deltas, rows: Dynamic) -> Deltas:
    """Some adapters of a bank.

    Args:
      bank: factors [N, ...].
      rows: a slice or an array of numbers of adapters, or an int for one of them.

    Returns:
      A bank; the deltas of one adapter for an int.
    """
    return jax.tree.map(lambda t: t[rows], bank)


def first(bank: Deltas) -> Deltas:
    """The first adapter of a bank.

    Args:
      bank: factors [N, ...].

    Returns:
      Its deltas.
    """
    return jax.tree.map(lambda t: t[0], bank)


def dense(x: Deltas) -> dict[str, np.ndarray]:
    """The matrices of deltas.

    Args:
      x: deltas of one adapter or of a bank.

    Returns:
      {path: float64 [..., d_in, d_out]}.
    """
    pairs = {path: (np.asarray(d[0], np.float64), np.asarray(d[1], np.float64)) for path, d in
             x.items()}  # fmt: skip
    return {path: u @ v for path, (u, v) in pairs.items()}


def gap(x: Deltas, y: Deltas) -> Errors:
    """How far two results are apart.

    Args:
      x: deltas of at least the sites of y.
      y: deltas.

    Returns:
      {path: Frobenius norm of the difference}.
    """
    a, b = dense(x), dense(y)
    return {p: float(np.sqrt(((a[p] - b[p]) ** 2).sum())) for p in b}
