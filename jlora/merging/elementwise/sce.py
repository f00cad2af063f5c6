"""SCE: select the elements whose deltas disagree most, weigh by energy, erase minority signs.

==========  =====================================================================
D_n         delta of adapter n, [d_in, d_out]
S           mask of the k largest variances, k = floor(density * non-zero ones)
eta_n       coefficient of adapter n, one per site
a_n         whether sign(D_n) is that of the sum over n
w_n         weight; its sign is first given to D_n, and 0 leaves the adapter out
scale       lambda, of the result
==========  =====================================================================

.. math::
    X_n = [\\, \\text{var}_n D \\ge t \\,] D_n, \\quad
    \\eta_n = \\frac{|w_n| |X_n|_F^2}{\\sum_m |w_m| |X_m|_F^2}, \\quad
    M = \\lambda \\frac{\\sum_n a_n \\eta_n X_n}{\\sum_n a_n \\eta_n}

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a density outside (0, 1], a rank out of range.

Paper: FuseChat, Wan et al. 2024, arXiv:2408.07990.
Source: paper; the selection among non-zero variances and the last division as in mergekit
(formula only).
Deviates: the weights multiply the energies (the paper has none); elements equal to the threshold
are all kept.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import majority, signed, spread
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import Merging
from jlora.merging.engine.streamed import Rule, Solver, Sparsify, factor, fold
from jlora.types import Dynamic


def sce(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    density: float = 0.1,
    scale: Float[Array, ""] | float = 1.0,
    rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """SCE on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      density: share of the elements of non-zero variance that is kept, in (0, 1]; 0.1, the
        paper's (mergekit's `select_topk`, there 1).
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: a density or a rank out of range.
    """
    solver = solver or Solver()
    rule = sce_rule(bank, weights, density=density, scale=scale, block=solver.block)
    return factor(bank, rule, rank, solver)


def sce_rule(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    density: float = 0.1,
    scale: Float[Array, ""] | float = 1.0,
    block: int | None = None,
) -> Rule:
    """M by row blocks.

    Args are those of `sce`.

    Args:
      block: rows at a time; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    select = _selection(bank, weights, density, block)

    def energy(carry: Array, d: Array, numbers: Array, along: Dynamic) -> Array:
        return carry + jnp.sum(select(d, numbers) ** 2, axis=(1, 2))

    raw = jnp.abs(weights) * fold(bank, energy, jnp.zeros(weights.shape, bank.u.dtype), block)
    total = jnp.sum(raw)
    eta = raw / jnp.where(total == 0, jnp.ones_like(total), total)
    return partial(_fused, select, eta, scale)


def _fused(select: Sparsify, eta: Array, scale: Array | float, d: Array, numbers: Array) -> Array:
    x = select(d, numbers)
    agree = (jnp.sign(x) == majority(x, "sum")[None]).astype(x.dtype)
    w = spread(eta, x) * agree
    share = jnp.sum(w, axis=0)
    return scale * jnp.sum(w * x, axis=0) / jnp.where(share == 0, jnp.ones_like(share), share)


def variance(d: Float[Array, "n ... c"], weights: Float[Array, "n"]) -> Array:
    """The variance of each element over the adapters whose weight is not 0.

    Args:
      d: deltas.
      weights: of the adapters.

    Returns:
      [1, ..., c].
    """
    live = spread((weights != 0).astype(d.dtype), d)
    count = jnp.maximum(jnp.sum(live), jnp.ones((), d.dtype))
    mean = jnp.sum(live * d, axis=0, keepdims=True) / count
    return jnp.sum(live * (d - mean) ** 2, axis=0, keepdims=True) / count


def _selection(bank: LowRank, weights: Array, density: float, block: int | None) -> Sparsify:
    """The function [N, b, d_out] -> the selected elements of signed deltas."""
    (_, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    threshold.kept(density, 1, d_in * d_out)
    if threshold.is_one(density):
        return partial(_all, weights)

    def statistic(d: Array) -> Array:
        return variance(signed(d, weights), weights)

    def live(carry: Array, d: Array, numbers: Array, along: Dynamic) -> Array:
        return carry + jnp.sum(statistic(d) > 0, dtype=jnp.int32)

    nonzero = fold(bank, live, jnp.zeros((), jnp.int32), block)
    k = jnp.floor(nonzero.astype(jnp.float32) * density).astype(jnp.int32)
    t = threshold.kth_largest(bank, statistic, jnp.maximum(k, 1)[None], block=block)
    t = jnp.where(k > 0, t, jnp.full_like(t, jnp.inf))
    return partial(_varied, t, weights)


def _varied(t: Array, weights: Array, d: Array, numbers: Array) -> Array:
    d = _all(weights, d, numbers)
    return jnp.where(threshold.above(variance(d, weights), t), d, jnp.zeros_like(d))


def _all(weights: Array, d: Array, numbers: Array) -> Array:
    """Deltas with the signs of their weights, those of weight 0 zero."""
    return jnp.where(spread(weights, d) == 0, jnp.zeros_like(d), signed(d, weights))


SYSTEM = Merging(
    name="sce",
    paper="Wan 2024, 2408.07990",
    symbol="sce",
    claim="sce",
    function=sce,
    loop="map",
    options={"density": 0.5},
    rule=sce_rule,
    breaks={
        "weight_one": "elements that do not vary are not selected",
        "idempotent": "elements that do not vary are not selected",
    },
    evidence="dense numpy value, limits, the paper's claim in small; law suite",
)
