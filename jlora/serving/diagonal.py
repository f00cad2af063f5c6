r"""Thin products in which every row of a batch meets its own components only.

=====  ====================================================================================
k      a component; :math:`o_k` is its `owner`, the number of the one row that it belongs to
n      `row`, the number of a row; no other row of the batch has it, unless no component does
T      components of the batch, in blocks of `BLOCK` that have one owner
m      tokens of a row: 1 where answers grow
=====  ====================================================================================

.. math::
    h_k = x_{n = o_k} \cdot u_k, \qquad y_n = \sum_{k:\, o_k = n} h_k v_k

Written for one row, :math:`h = x U` and :math:`y = ([o = n] \odot h) V`, as in
`jlora.serving.components`. Under `jax.vmap` over rows that is b T (d_in + d_out) multiply-adds per
token, of which a mask keeps one in b where adapters differ. Here the rows are seen together: what
belongs to nobody else's row is all of :math:`x U` that there is, T numbers for the whole batch,
and a block of components is multiplied with the tokens of its row. T (d_in + d_out) multiply-adds
per token remain, and every component is read once.

Rows do not meet in a sum: what is infinite in one row changes no other.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA), section on heterogeneous ranks; Chen et al.
    2023, arXiv:2310.18547 (Punica) for the gathered matrix-vector products.
Deviates: no kernel: batched products of blocks and a segment sum. Not for reverse mode.
"""

import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from jlora.types import Dynamic

BLOCK = 4  # components of one row that lie together; the smallest rank that is common


@custom_vmap
def inward(
    x: Float[Array, "*tokens d_in"],
    u: Float[Array, "T d_in"],
    owner: Int[Array, "T"],
    row: Int[Array, ""],
) -> Float[Array, "*tokens T"]:
    """x U, of which a row may read the numbers of its own components only.

    Args:
      x: tokens of a row; under `jax.vmap` of all rows.
      u: first factors of all components.
      owner: the row of each, the same in every block.
      row: the number of the row.

    Returns:
      h; under `jax.vmap` over x and row the same array for all rows.
    """
    return x @ u.T


@inward.def_vmap
def _inward_rows(size: int, batched: list[bool], *args: Array) -> tuple[Array, bool]:
    x, u, owner, row = args
    if not (batched[0] and batched[3]) or batched[1] or batched[2]:
        return _one_by_one(inward.fun, size, batched, args)
    at, block = _places(owner, row)
    rows = x.reshape(size, -1, x.shape[-1])[jnp.minimum(at, size - 1)]
    h = jnp.einsum("gmd,gkd->mgk", rows, u.reshape(len(at), block, -1))
    return h.reshape(*x.shape[1:-1], len(u)), False


@custom_vmap
def outward(
    h: Float[Array, "*tokens T"],
    v: Float[Array, "T d_out"],
    owner: Int[Array, "T"],
    row: Int[Array, ""],
) -> Float[Array, "*tokens d_out"]:
    """What the components of a row add to its tokens.

    Args:
      h: of `inward`.
      v: second factors of all components.
      owner: the row of each, the same in every block.
      row: the number of the row; one that owns nothing gets zeros.

    Returns:
      y.
    """
    mine = (owner == row).reshape(*[1] * (h.ndim - 1), -1)
    return jnp.where(mine, h, jnp.zeros((), h.dtype)) @ v


@outward.def_vmap
def _outward_rows(size: int, batched: list[bool], *args: Array) -> tuple[Array, bool]:
    h, v, owner, row = args
    if batched[0] or not batched[3] or batched[1] or batched[2]:
        return _one_by_one(outward.fun, size, batched, args)
    at, block = _places(owner, row)
    y = jnp.einsum("mgk,gko->gmo", h.reshape(-1, len(at), block), v.reshape(len(at), block, -1))
    out = jnp.zeros((size, *y.shape[1:]), y.dtype).at[at].add(y, mode="drop")
    return out.reshape(size, *h.shape[:-1], v.shape[1]), True


def _places(owner: Array, row: Array) -> tuple[Array, int]:
    """Where in the batch the owner of each block is, b for nobody; and the size of a block.

    A device that holds part of the components may hold part of a block.
    """
    block = math.gcd(BLOCK, len(owner))
    owned = owner[None, ::block] == row[:, None]
    at = jnp.where(jnp.any(owned, axis=0), jnp.argmax(owned, axis=0), len(row))
    return at.astype(jnp.int32), block


def _one_by_one(
    fn: Dynamic, size: int, batched: list[bool], args: tuple[Array, ...]
) -> tuple[Array, bool]:
    axes = tuple(0 if b else None for b in batched)
    return jax.vmap(fn, axes, axis_size=size)(*args), True
