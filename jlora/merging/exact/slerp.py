"""Spherical means of adapters: SLERP and NuSLERP of two, multi-SLERP of any number.

=======  =============================================================================
Δ_n      delta of adapter n; a vector as a whole ("flat"), or one for each output or
         input unit (`axis` "out", "in")
t        |w_2| / (|w_1| + |w_2|)
Ω        angle between Δ_1 and Δ_2
α_n      |w_n| divided by their sum; the sign of a weight is first given to Δ_n
=======  =============================================================================

.. math::
    \\text{SLERP}: \\; \\frac{\\sin((1 - t) \\Omega)}{\\sin \\Omega} \\Delta_1 +
                      \\frac{\\sin(t \\Omega)}{\\sin \\Omega} \\Delta_2, \\qquad
    \\text{multi}: \\; \\Big(\\sum_n \\alpha_n |\\Delta_n|\\Big)
    \\exp_m \\sum_n \\alpha_n \\log_m \\frac{\\Delta_n}{|\\Delta_n|}

with m the direction of :math:`\\sum_n \\alpha_n \\Delta_n / |\\Delta_n|`. Each is a combination of
deltas: only angles are computed (on cores or Gram matrices), the sum itself is exact and factored.
Nearly parallel vectors (|cos Ω| > 0.9995) are interpolated linearly. NuSLERP is SLERP of flat
vectors where SLERP takes output units, as in mergekit. A zero delta has no direction: multi-SLERP
leaves it out, and zero deltas or weights alone give zero. Directions whose weighted sum vanishes
have no mean: the result of multi-SLERP is not finite, which `merge` reports.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank N R.
Raises ValueError for N != 2 (SLERP, NuSLERP), or an unknown axis.

Paper: Shoemake 1985; Goddard et al. 2024, arXiv:2403.13257 (mergekit).
Source: mergekit's formulas.
Deviates: deltas are the vectors, no base is added. mergekit divides by the sum of the weights
themselves: with negative ones t leaves 0..1, and the result is as large as that sum is small.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.engine.spectral_functions import dot
from jlora.merging.exact.concat import concat
from jlora.merging.signs import absorbed
from jlora.merging.spectral.core_space import to_core

CANCELS = 1e-5  # norm of a mean of unit vectors, below which it is rounding


def slerp(bank: LowRank, weights: Float[Array, "2"], *, axis: str = "out") -> LowRank:
    """Spherical interpolation of two adapters, of one site.

    Args:
      bank: u [2, d_in, R], v [2, R, d_out].
      weights: [2], of any sign; only t matters, and whether both are 0 (then so is the result).
      axis: the vectors: each output's ("out", as in mergekit), each input's ("in"), or "flat".

    Returns:
      u [d_in, 2 R], v [2 R, d_out].

    Raises:
      ValueError: another number of adapters, or an unknown axis.
    """
    if bank.u.shape[0] != 2:
        raise ValueError(f"slerp: got {bank.u.shape[0]} adapters, expected 2")
    bank, weights = absorbed(bank, weights)
    total = jnp.sum(weights)
    some = total > 0
    t = weights[1] / jnp.where(some, total, jnp.ones_like(total))
    g = _gram(bank, axis)  # [2, 2] or [2, 2, units]
    c = _pair(g[0, 0], g[1, 1], g[0, 1], t) * some.astype(t.dtype)
    if axis == "flat":
        return concat(bank, c)
    one = jnp.ones_like(weights)
    if axis == "out":
        return concat(LowRank(bank.u, bank.v * c[:, None, :]), one)
    return concat(LowRank(bank.u * c[:, :, None], bank.v), one)


def nuslerp(bank: LowRank, weights: Float[Array, "2"], *, axis: str = "flat") -> LowRank:
    """Spherical interpolation of two adapters as whole vectors, of one site.

    Args, Returns and Raises are those of `slerp`; the default of `axis` is mergekit's "flat".
    """
    return slerp(bank, weights, axis=axis)


def multislerp(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """One step of the spherical mean, from the direction of the mean; of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; only their ratios matter, and whether all are 0.

    Returns:
      u [d_in, N R], v [N R, d_out]; not finite where the directions cancel.
    """
    bank, weights = absorbed(bank, weights)
    return concat(bank, mean_direction(bank, weights, 1))


def mean_direction(bank: LowRank, weights: Float[Array, "n"], steps: int) -> Array:
    """Coefficients of the spherical mean times the mean norm.

    Zero deltas are left out; all coefficients are 0 where nothing is left.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: >= 0.
      steps: of the iteration.

    Returns:
      [N].
    """
    n = weights.shape[0]
    y = to_core(bank).cores.reshape(n, -1)
    norm = safe_norm(y)
    live = (norm > 0).astype(y.dtype)
    inverse = live / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    total = jnp.sum(weights * live)
    some = total > 0
    alpha = weights * live / jnp.where(some, total, jnp.ones_like(total))
    unit = y * inverse[:, None]
    c = alpha * inverse  # coefficients of the point

    def move(c: Array, _: None) -> tuple[Array, None]:
        m = c @ y
        cos = unit @ m
        gap = unit - cos[:, None] * m[None, :]
        sin = safe_norm(gap)
        small = sin < 1e-6
        safe = jnp.where(small, 1.0, sin)  # also where a zero delta has cos = sin = 0
        ratio = jnp.where(small, 1.0, jnp.arctan2(safe, cos) / safe)
        step = alpha * ratio * inverse - jnp.sum(alpha * ratio * cos) * c
        size = safe_norm(step @ y)
        still = size < 1e-6
        grow = jnp.where(still, 1.0, jnp.sin(size) / jnp.where(still, 1.0, size))
        c = jnp.cos(size) * c + grow * step
        size = safe_norm(c @ y)
        return c / jnp.where(some, size, jnp.ones_like(size)), None

    start = safe_norm(c @ y)  # of unit vectors' mean
    start = jnp.where(start < CANCELS, 0.0, start)  # no mean then: not finite, instead of rounding
    c, _ = lax.scan(move, c / jnp.where(some, start, jnp.ones_like(start)), None, length=steps)
    return jnp.where(some, c * jnp.sum(alpha * norm), jnp.zeros_like(c))


def safe_norm(x: Float[Array, "... n"]) -> Array:
    """The norm over the last axis, of derivative zero at zero.

    Args:
      x: vectors.

    Returns:
      [...].
    """
    square = jnp.sum(x * x, axis=-1)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, jnp.ones_like(square))), 0)


def _gram(bank: LowRank, axis: str) -> Array:
    u, v = bank
    if axis == "flat":
        return dot("air,bis,aro,bso->ab", u, u, v, v)
    if axis == "out":
        return dot("abrs,aro,bso->abo", dot("air,bis->abrs", u, u), v, v)
    if axis == "in":
        return dot("abrs,air,bis->abi", dot("aro,bso->abrs", v, v), u, u)
    raise ValueError(f"axis: got {axis!r}, expected 'flat', 'out' or 'in'")


def _pair(aa: Array, bb: Array, ab: Array, t: Array) -> Array:
    """Coefficients [2, ...] of the two vectors with squared norms aa, bb and product ab."""
    square = aa * bb
    some = square > 0
    cos = jnp.where(some, ab / jnp.sqrt(jnp.where(some, square, jnp.ones_like(square))), 1.0)
    near = jnp.abs(cos) > 0.9995
    angle = jnp.arccos(jnp.where(near, jnp.zeros_like(cos), cos))
    sin = jnp.sin(angle)
    t = jnp.broadcast_to(t, cos.shape)
    first = jnp.where(near, 1 - t, jnp.sin((1 - t) * angle) / sin)
    return jnp.stack([first, jnp.where(near, t, jnp.sin(t * angle) / sin)])


SYSTEMS = (
    Merging(
        name="slerp",
        paper="Goddard 2024, 2403.13257 (mergekit)",
        symbol="slerp",
        claim="slerp",
        function=slerp,
        size=2,
        evidence="numpy value; law suite",
    ),
    Merging(
        name="nuslerp",
        paper="Goddard 2024, 2403.13257 (mergekit)",
        symbol="nuslerp",
        claim="nuslerp",
        function=nuslerp,
        size=2,
        evidence="numpy value; law suite",
    ),
    Merging(
        name="multislerp",
        paper="Goddard 2024, 2403.13257 (mergekit)",
        symbol="multislerp",
        claim="multislerp",
        function=multislerp,
        evidence="numpy value; law suite",
    ),
)
