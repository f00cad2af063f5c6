"""Core Space: adapters of one site as small matrices in common bases, merged there.

==========  =============================================================================
u_n, v_n    factors of adapter n, [d_in, R], [R, d_out]
L, T        orthonormal bases of all u_n [d_in, p] and of all v_n [q, d_out]
C_n         cores [p, q], p = min(N R, d_in), q = min(N R, d_out)
w_n         weights
==========  =============================================================================

.. math:: u_n v_n = L C_n T, \\qquad C_n = (L^T u_n)(v_n T^T)

No information is lost, and everything that does not depend on the choice of bases (spectra, norms,
products) can be done on the cores. `merge_core` is the method of the paper: it merges the cores
entry by entry, in the singular bases of all factors; with `rule="sum"` that is the exact sum.
"ties": trim each core to its `density` largest entries, elect the sign of the weighted sum, take
the mean of those that agree, weighted by |w_n|; times `scale`. "dare" is left to the elementwise
family.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result [d_in, k], [k, d_out] with
k = min(p, q). Raises ValueError for an unknown rule, or a density outside (0, 1].

Paper: Panariello et al. 2025, Accurate and Efficient Low-Rank Model Merging in Core Space;
TIES: Yadav et al. 2023, arXiv:2306.01708.
Source: official code (apanariello4/core-space-merging).
Deviates: the factors are balanced by their own SVDs first, so that the common bases, and hence
the entrywise merge, do not depend on the gauge of an adapter; the official code takes them raw.
Weights are ours. Gradients hold the singular bases fixed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import algebra, numerics
from jlora.algebra import LowRank
from jlora.merging.engine.record import HELD, SMALL_ENTRIES, Merging
from jlora.merging.engine.spectral_functions import basis, dot
from jlora.merging.signs import without_absent
from jlora.types import Dynamic


class Core(NamedTuple):
    """Adapters of one site in common orthonormal bases."""

    left: Array  # [d_in, p]
    cores: Array  # [N, p, q]
    right: Array  # [q, d_out]


def to_core(bank: LowRank) -> Core:
    """The cores of a bank of one site, in any orthonormal bases.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].

    Returns:
      left [d_in, p], cores [N, p, q], right [q, d_out].
    """
    left, right = basis(_columns(bank.u)), basis(_columns(bank.v.mT)).T
    cores = dot("ip,nir,nro,qo->npq", left, bank.u, bank.v, right)
    return Core(left, cores, right)


def from_core(core: Core, merged: Float[Array, "p q"]) -> LowRank:
    """left @ merged @ right as factors.

    Args:
      core: the bases.
      merged: the merged core.

    Returns:
      Factors of rank min(p, q).
    """
    if merged.shape[0] < merged.shape[1]:
        return LowRank(core.left, dot("pq,qo->po", merged, core.right))
    return LowRank(dot("ip,pq->iq", core.left, merged), core.right)


def merge_core(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    rule: str = "ties",
    density: float | tuple[float, ...] = 0.2,
    scale: Float[Array, ""] | float = 1.0,
) -> LowRank:
    """The cores of the balanced singular bases, merged entry by entry.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      rule: "ties" (trim, elect, mean), or "sum", which is exact.
      density: share of the entries of each core that "ties" keeps, in (0, 1]; one number, or a
        tuple of N; 0.2, as in TIES.
      scale: lambda, a factor of the result; 1.

    Returns:
      u [d_in, k], v [k, d_out], k = min(p, q).

    Raises:
      ValueError: an unknown rule, or a density out of range.
    """
    u, s, v = algebra.svd({"": without_absent(bank, weights)})[""]
    root = jnp.sqrt(s)
    left = _singular(_columns(u * root[:, None, :]))
    right = _singular(_columns((root[..., None] * v).mT)).T
    left, right = lax.stop_gradient(left), lax.stop_gradient(right)
    core = Core(left, dot("ip,nir,nro,qo->npq", left, bank.u, bank.v, right), right)
    return from_core(core, scale * entrywise(core.cores, weights, rule, density))


def entrywise(
    x: Float[Array, "n ..."],
    weights: Float[Array, "n"],
    rule: str,
    density: float | tuple[float, ...],
) -> Array:
    """Tensors merged entry by entry.

    Args:
      x: one tensor per adapter.
      weights: of any sign.
      rule: "ties" (trim, elect, mean) or "sum".
      density: share of the entries that "ties" keeps, in (0, 1]; a number, or a tuple of N of them.

    Returns:
      [...].

    Raises:
      ValueError: another rule.
    """
    w = weights.reshape(-1, *[1] * (x.ndim - 1))
    if rule == "sum":
        return jnp.sum(w * x, axis=0)
    if rule != "ties":
        raise ValueError(f"rule: got {rule!r}, expected 'sum' or 'ties'")
    many = density if isinstance(density, tuple) else (density,) * x.shape[0]
    x = x * jnp.stack([largest(t, share) for t, share in zip(x, many, strict=True)])
    y = w * x
    elected = jnp.where(jnp.sum(y, axis=0) >= 0, 1.0, -1.0).astype(x.dtype)
    agree = (y * elected[None] > 0).astype(x.dtype)
    total = jnp.sum(jnp.abs(w) * agree, axis=0)
    some = total != 0
    return jnp.where(some, jnp.sum(agree * y, axis=0) / jnp.where(some, total, 1.0), 0.0)


def largest(x: Float[Array, "..."], density: float, size: Dynamic = None) -> Array:
    """Which entries are among the largest magnitudes; at least one is.

    Args:
      x: the entries.
      density: share of them, in (0, 1].
      size: [], how many of the entries are no padding; None: all.

    Returns:
      As x, 1 or 0.

    Raises:
      ValueError: a density out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density: got {density}, expected 0 < density <= 1")
    sizes = jnp.abs(lax.stop_gradient(x)).reshape(-1)
    if size is None:
        least = lax.top_k(sizes, max(1, round(density * x.size)))[0][-1]
    else:
        count = jnp.maximum(jnp.round(density * size), 1).astype(jnp.int32)
        least = jnp.sort(sizes)[x.size - count]
    return (sizes >= least).astype(x.dtype).reshape(x.shape)


def _columns(u: Array) -> Array:
    """[N, d, r] as [d, N r]."""
    return jnp.moveaxis(u, 0, 1).reshape(u.shape[1], -1)


def _singular(x: Array) -> Array:
    """Left singular vectors [d, p] of x [d, n], through the QR."""
    q, r = numerics.qr(x)
    return q @ numerics.svd(r)[0]


SYSTEM = Merging(
    name="core_space",
    paper="Panariello 2025; Yadav 2023, 2306.01708",
    symbol="merge_core",
    claim="core_space",
    function=merge_core,
    options={"density": 0.2},
    breaks={
        "weight_one": SMALL_ENTRIES,
        "difference": HELD,
    },
    evidence="numpy value; law suite",
)
