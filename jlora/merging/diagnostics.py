"""How much adapters of a bank get into each other's way: signs, subspaces, energy.

=========  ==============================================================================
Δ_n        delta of adapter n, one site, [d_in, d_out], factored
X_n, Y_n   its left and right singular bases, of rank r_n
=========  ==============================================================================

.. math::
    \\text{conflict}_{nm} =
    \\frac{\\#\\{\\Delta_n \\Delta_m < 0\\}}{\\#\\{\\Delta_n \\Delta_m \\ne 0\\}}, \\quad
    \\text{cancelled} = 1 - \\frac{\\sum |\\sum_n \\Delta_n|}{\\sum \\sum_n |\\Delta_n|}, \\quad
    \\text{overlap}_{nm} = \\frac{\\|X_n^T X_m\\|_F^2}{\\min(r_n, r_m)}

Signs are counted over blocks of rows, so that no dense delta is held; overlaps come from thin
factors. The principal angles of two adapters are `jlora.algebra.principal_angles`.

Paper: sign conflicts: Yadav et al. 2023, arXiv:2306.01708; subspace overlap: Hu et al. 2021,
arXiv:2106.09685, section 7.2.
Source: papers.
Deviates: overlaps are divided by the smaller rank, so that 1 is "contained".
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora import algebra
from jlora.algebra import Deltas, LowRank
from jlora.merging.engine.spectral_functions import dot, support
from jlora.system import System


class Conflict(NamedTuple):
    """Signs of the entries of a site."""

    pairs: Array  # [*stack, N, N], share of entries of opposite signs, 0 on the diagonal
    cancelled: Array  # [*stack], share of the magnitude that the plain sum loses


class Overlap(NamedTuple):
    """Subspaces of a site: 0 orthogonal, 1 one contains the other."""

    inputs: Array  # [*stack, N, N]
    outputs: Array  # [*stack, N, N]


def sign_conflict(bank: Deltas, *, block: int = 64) -> dict[str, Conflict]:
    """How often the adapters of a bank disagree on the sign of an element.

    Args:
      bank: {path: deltas [N, *stack, ...]}, factored.
      block: rows of each delta that exist at a time; 64 keeps the dense part small.

    Returns:
      {path: Conflict}.

    Raises:
      ValueError: a block < 1.
    """
    if block < 1:
        raise ValueError(f"block: got {block}, expected at least 1")
    out = {}
    for path, d in bank.items():
        low = algebra.low_rank(d)
        one = functools.partial(_conflict, block)
        for _ in range(low.u.ndim - 3):
            one = jax.vmap(one, in_axes=1)
        out[path] = one(low)
    return out


def overlap(bank: Deltas) -> dict[str, Overlap]:
    """How much of their input and output spaces the adapters of a bank share.

    Args:
      bank: {path: deltas [N, *stack, ...]}, factored.

    Returns:
      {path: Overlap}; a zero delta overlaps with nothing.
    """
    out = {}
    for path, (u, s, v) in algebra.svd(bank).items():
        size = max(u.shape[-2], v.shape[-1])
        live = support(s, size)
        rank = jnp.moveaxis(jnp.sum(live, axis=-1), 0, -1)  # [*stack, N]
        least = jnp.minimum(rank[..., :, None], rank[..., None, :])
        x, y = u * live[..., None, :], v.mT * live[..., None, :]
        shares = []
        for t in (x, y):
            square = dot("n...ir,m...is->...nmrs", t, t) ** 2
            shares.append(jnp.sum(square, axis=(-2, -1)) / jnp.maximum(least, 1.0))
        out[path] = Overlap(*shares)
    return out


def _conflict(block: int, low: LowRank) -> Conflict:
    n, d_in, r = low.u.shape
    count = -(-d_in // block)
    rows = jnp.pad(low.u, [(0, 0), (0, count * block - d_in), (0, 0)])
    rows = jnp.moveaxis(rows.reshape(n, count, block, r), 1, 0)

    def step(sums: tuple[Array, ...], u: Array) -> tuple[tuple[Array, ...], None]:
        d = dot("nbr,nro->nbo", u, low.v)
        plus, minus = (d > 0).astype(d.dtype), (d < 0).astype(d.dtype)
        both = plus + minus
        new = (
            2 * dot("nbo,mbo->nm", plus, minus),
            dot("nbo,mbo->nm", both, both),
            jnp.sum(jnp.abs(jnp.sum(d, axis=0))),
            jnp.sum(jnp.abs(d)),
        )
        return tuple(a + b for a, b in zip(sums, new, strict=True)), None

    square, zero = jnp.zeros((n, n), low.u.dtype), jnp.zeros((), low.u.dtype)
    (against, both, of_sum, size), _ = lax.scan(step, (square, square, zero, zero), rows)
    pairs = (against + against.T) / 2 / jnp.maximum(both, 1.0)
    some = size > 0
    kept = jnp.where(some, of_sum / jnp.where(some, size, jnp.ones_like(size)), 1.0)
    return Conflict(pairs, 1 - kept)


SYSTEM = System(
    name="Interference diagnostics",
    paper="Yadav 2023, 2306.01708; Hu 2021, 2106.09685",
    symbol="sign_conflict",
    evidence="signs and overlaps by dense numpy; landmarks; mutation check",
    kind="component",
)
