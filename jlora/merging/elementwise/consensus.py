"""Consensus merging: keep the elements of the merged delta that at least `least` tasks use.

==========  ==================================================================
D_n         delta of adapter n, [d_in, d_out]
w_n         its weight, of any sign; 0 leaves the task out
T           the merged delta, lambda * sum of w_n D_n
b_n         task mask: task n uses the element
mu          `sharpness` (the paper's lambda_t): larger is sparser
==========  ==================================================================

.. math::
    b_n = [\\, |D_n| \\ge \\mu \\, |T - \\text{sgn}(w_n) D_n| \\,], \\qquad
    M = [\\, \\sum_n b_n \\ge \\text{least} \\,] \\; T, \\qquad M \\approx U V

An element that only one task uses is selfish, one that none uses is catastrophic: both go.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a negative sharpness, `least` outside 0..N, a rank out of range.

Paper: Wang et al. 2024, arXiv:2405.07813 (TALL masks; consensus task arithmetic).
Source: paper.
Deviates: the masks come from the weighted sum, so with weights 1 they are the paper's.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.election import signed, spread, weighted
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import Merging
from jlora.merging.engine.streamed import Rule, Solver, factor


def consensus(
    bank: LowRank, weights: Float[Array, "n"], *, sharpness: float = 0.4, least: int = 2,
    scale: Float[Array, ""] | float = 1.0, rank: int | None = None, solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """Consensus task arithmetic on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      sharpness: mu, at least 0; 0.4 (the paper tunes it in 0.2 to 0.6).
      least: how many tasks must use an element that is kept, 0 to N; 2, as in the paper.
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: sharpness, `least` or a rank out of range.
    """
    rule = consensus_rule(bank, weights, sharpness=sharpness, least=least, scale=scale)
    return factor(bank, rule, rank, solver)


def consensus_rule(
    bank: LowRank, weights: Float[Array, "n"], *, sharpness: float = 0.4, least: int = 2,
    scale: Float[Array, ""] | float = 1.0,
) -> Rule:  # fmt: skip
    """M by row blocks.

    Args are those of `consensus`.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].

    Raises:
      ValueError: sharpness or `least` out of range.
    """
    n = bank.u.shape[0]
    if sharpness < 0:
        raise ValueError(f"sharpness: got {sharpness}, expected at least 0")
    if not 0 <= least <= n:
        raise ValueError(f"least: got {least}, expected 0 to {n}, the number of adapters")
    return partial(_agreed, weights, scale, sharpness=float(sharpness), least=int(least))


def _agreed(
    weights: Array, scale: Array | float, d: Array, numbers: Array,
    *, sharpness: float, least: int,
) -> Array:  # fmt: skip
    total = scale * weighted(d, weights)
    uses = task_masks(signed(d, weights), total, sharpness)
    uses = uses * (spread(weights, d) != 0).astype(jnp.int32)
    return jnp.where(jnp.sum(uses, axis=0) >= least, total, jnp.zeros_like(total))


def task_masks(
    d: Float[Array, "n b d_out"], total: Float[Array, "b d_out"], sharpness: float
) -> Array:
    """The elements that each task uses.

    Args:
      d: deltas, with the signs of their weights.
      total: the merged delta T.
      sharpness: mu, at least 0.

    Returns:
      [N, b, d_out] int32, 1 or 0.
    """
    return (jnp.abs(d) >= sharpness * jnp.abs(total[None] - d)).astype(jnp.int32)


SYSTEM = Merging(
    name="consensus",
    paper="Wang 2024, 2405.07813",
    symbol="consensus",
    claim="consensus",
    function=consensus,
    loop="map",
    options={"least": 1},
    rule=consensus_rule,
    evidence="dense numpy value, limits, the paper's claim in small; law suite",
)
