"""Keys of randomised merges: one per site, slice and adapter, whatever the order of the sites."""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

Ids = ArrayLike | Sequence[int]  # [N], names of adapters in the keys of random masks


def keys_of(key: PRNGKeyArray, path: str, slices: int, size: int, ids: Ids | None = None) -> Array:
    """One key for each slice and adapter of a site.

    Args:
      key: of the whole merge.
      path: the site.
      slices: S.
      size: N.
      ids: [N], names of the adapters; None: 0..N-1.

    Returns:
      [S, N] keys.
    """
    return keys_of_sites(key, ((path, slices),), size, ids)


def keys_of_sites(
    key: PRNGKeyArray, sites: Sequence[tuple[str, int]], size: int, ids: Ids | None = None
) -> Array:
    """`keys_of` of several sites, one after the other.

    All at once: a program that draws them for each site compiles as many generators.

    Args:
      key: of the whole merge.
      sites: path and number of slices of each.
      size: N.
      ids: [N], names of the adapters; None: 0..N-1.

    Returns:
      [sum of all S, N] keys.
    """
    ids = jnp.arange(size, dtype=jnp.uint32) if ids is None else jnp.asarray(ids, jnp.uint32)
    numbers = np.asarray([(zlib.crc32(p.encode()), s) for p, n in sites for s in range(n)], "u4")
    fold = jax.random.fold_in

    def one(path: Array, row: Array) -> Array:
        return jax.vmap(lambda n: fold(fold(fold(key, path), row), n))(ids)

    return jax.vmap(one)(jnp.asarray(numbers[:, 0]), jnp.asarray(numbers[:, 1]))
