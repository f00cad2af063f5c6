"""SCE: select the elements whose deltas disagree most, weigh by energy, erase minority signs.

==========  =====================================================================
D_n         delta of adapter n, [d_in, d_out]
S           mask of the k largest variances, k = floor(density * non-zero ones)
eta_n       coefficient of adapter n, one a site
a_n         whether sign(D_n) is that of the sum over n
scale       lambda, of the result
==========  =====================================================================

.. math::
    X_n = [\\, \\text{var}_n D \\ge t \\,] D_n, \\quad
    \\eta_n = \\frac{w_n |X_n|_F^2}{\\sum_m w_m |X_m|_F^2}, \\quad
    M = \\lambda \\frac{\\sum_n a_n \\eta_n X_n}{\\sum_n a_n \\eta_n}

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a density outside (0, 1], a rank out of range.

Paper: FuseChat, Wan et al. 2024, arXiv:2408.07990.
Source: paper; the selection among non-zero variances and the last division as in mergekit
(formula only).
Deviates: the weights multiply the energies (the paper has none); elements equal to the threshold
are all kept.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import majority, spread
from jlora.merging.engine.streamed import Rule, Solver, factor, fold


def sce(
    bank: LowRank, weights: Array, *, rank: int | None = None, solver: Solver | None = None,
    **options: Any,
) -> LowRank:  # fmt: skip
    """SCE on one site; `options` are those of `sce_rule`."""
    return factor(bank, sce_rule(bank, weights, **options), rank, solver)


def sce_rule(
    bank: LowRank, weights: Array, *, density: float = 0.1, scale: float = 1.0,
    block: int | None = None,
) -> Rule:  # fmt: skip
    """M by row blocks."""
    select = _selected(bank, density, block)

    def energy(carry: Array, d: Array, numbers: Array, along: Any) -> Array:
        return carry + jnp.sum(select(d) ** 2, axis=(1, 2))

    raw = weights * fold(bank, energy, jnp.zeros(weights.shape, bank.u.dtype), block)
    total = jnp.sum(raw)
    eta = raw / jnp.where(total == 0, jnp.ones_like(total), total)

    def rule(d: Array, numbers: Array) -> Array:
        x = select(d)
        agree = (jnp.sign(x) == majority(x, "sum")[None]).astype(x.dtype)
        w = spread(eta, x) * agree
        share = jnp.sum(w, axis=0)
        return scale * jnp.sum(w * x, axis=0) / jnp.where(share == 0, jnp.ones_like(share), share)

    return rule


def variance(d: Array) -> Array:
    """Over adapters: [N, ..., c] -> [1, ..., c]."""
    return jnp.var(d, axis=0, keepdims=True)


def _selected(bank: LowRank, density: float, block: int | None) -> Any:
    (_, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    threshold.kept(density, 1, d_in * d_out)
    if threshold.is_one(density):
        return lambda d: d

    def live(carry: Array, d: Array, numbers: Array, along: Any) -> Array:
        return carry + jnp.sum(variance(d) > 0, dtype=jnp.int32)

    nonzero = fold(bank, live, jnp.zeros((), jnp.int32), block)
    k = jnp.floor(nonzero.astype(jnp.float32) * density).astype(jnp.int32)
    t = threshold.kth_largest(bank, variance, jnp.maximum(k, 1)[None], block=block)
    t = jnp.where(k > 0, t, jnp.full_like(t, jnp.inf))
    return lambda d: jnp.where(threshold.above(variance(d), t), d, jnp.zeros_like(d))
