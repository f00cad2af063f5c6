"""Spherical means of adapters: SLERP and NuSLERP of two, multi-SLERP of any number.

=======  =============================================================================
Δ_n      delta of adapter n; a vector as a whole ("flat"), or one for each output or
         input unit (`axis` "out", "in")
t        w_2 / (w_1 + w_2)
Ω        angle between Δ_1 and Δ_2
α_n      weights divided by their sum
=======  =============================================================================

.. math::
    \\text{SLERP}: \\; \\frac{\\sin((1 - t) \\Omega)}{\\sin \\Omega} \\Delta_1 +
                      \\frac{\\sin(t \\Omega)}{\\sin \\Omega} \\Delta_2, \\qquad
    \\text{multi}: \\; \\Big(\\sum_n \\alpha_n |\\Delta_n|\\Big)
    \\exp_m \\sum_n \\alpha_n \\log_m \\frac{\\Delta_n}{|\\Delta_n|}

with m the direction of :math:`\\sum_n \\alpha_n \\Delta_n / |\\Delta_n|`. Each is a combination of
deltas: only angles are computed (on cores or Gram matrices), the sum itself is exact and factored.
Nearly parallel vectors (|cos Ω| > 0.9995) are interpolated linearly. NuSLERP is SLERP of flat
vectors where SLERP takes output units, as in mergekit. Vectors of opposite weights or directions
have no mean: the result is not finite, which `merge` reports.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank N R.
Raises ValueError for N != 2 (SLERP, NuSLERP), or an unknown axis.

Paper: Shoemake 1985; Goddard et al. 2024, arXiv:2403.13257 (mergekit).
Source: mergekit's formulas.
Deviates: deltas are the vectors, no base is added.
"""

import jax.numpy as jnp
from jax import Array, lax

from jlora.algebra import LowRank
from jlora.merging.engine.spectral_functions import dot
from jlora.merging.exact.concat import concat
from jlora.merging.spectral.core_space import to_core


def slerp(bank: LowRank, weights: Array, *, axis: str = "out") -> LowRank:
    """Spherical interpolation of two adapters, of one site."""
    if bank.u.shape[0] != 2:
        raise ValueError(f"slerp: got {bank.u.shape[0]} adapters, expected 2")
    t = weights[1] / jnp.sum(weights)
    g = _gram(bank, axis)  # [2, 2] or [2, 2, units]
    c = _pair(g[0, 0], g[1, 1], g[0, 1], t)
    if axis == "flat":
        return concat(bank, c)
    one = jnp.ones_like(weights)
    if axis == "out":
        return concat(LowRank(bank.u, bank.v * c[:, None, :]), one)
    return concat(LowRank(bank.u * c[:, :, None], bank.v), one)


def nuslerp(bank: LowRank, weights: Array, *, axis: str = "flat") -> LowRank:
    """Spherical interpolation of two adapters as whole vectors, of one site."""
    return slerp(bank, weights, axis=axis)


def multislerp(bank: LowRank, weights: Array) -> LowRank:
    """One step of the spherical mean, from the direction of the mean; of one site."""
    return concat(bank, mean_direction(bank, weights, 1))


def mean_direction(bank: LowRank, weights: Array, steps: int) -> Array:
    """Coefficients [N] of the spherical mean times the mean norm, after `steps` steps."""
    n = weights.shape[0]
    y = to_core(bank).cores.reshape(n, -1)
    norm = safe_norm(y)
    live = (norm > 0).astype(y.dtype)
    inverse = live / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    alpha = weights * live / jnp.sum(weights * live)
    unit = y * inverse[:, None]
    c = alpha * inverse  # coefficients of the point

    def move(c: Array, _: None) -> tuple[Array, None]:
        m = c @ y
        cos = unit @ m
        gap = unit - cos[:, None] * m[None, :]
        sin = safe_norm(gap)
        small = sin < 1e-6
        ratio = jnp.where(small, 1.0, jnp.arctan2(sin, cos) / jnp.where(small, 1.0, sin))
        step = alpha * ratio * inverse - jnp.sum(alpha * ratio * cos) * c
        size = safe_norm(step @ y)
        still = size < 1e-6
        grow = jnp.where(still, 1.0, jnp.sin(size) / jnp.where(still, 1.0, size))
        c = jnp.cos(size) * c + grow * step
        return c / safe_norm(c @ y), None

    c, _ = lax.scan(move, c / safe_norm(c @ y), None, length=steps)
    return c * jnp.sum(alpha * norm)


def safe_norm(x: Array) -> Array:
    """Norm over the last axis, of derivative zero at zero."""
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
