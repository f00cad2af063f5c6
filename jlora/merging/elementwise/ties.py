"""TIES merging: trim small elements of each delta, elect a sign for each element, average those.

==========  ==========================================================
D_n         delta of adapter n, [d_in, d_out]
t_n         the k-th largest of |D_n|, k = floor(density * d_in * d_out)
elect       the vote of `election.py`
scale       lambda, of the result
==========  ==========================================================

.. math:: M = \\lambda \\, \\text{elect}(w, [\\,|D_n| \\ge t_n\\,] D_n), \\qquad M \\approx U V

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a density outside (0, 1], a rank out of range, an unknown vote.

Paper: Yadav et al. 2023, arXiv:2306.01708.
Source: paper; weights as in mergekit (formula only).
Deviates: elements equal to the threshold are all kept; the result is M's best rank-`rank` part,
as the randomised SVD of `streamed.py` finds it.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import everything, voted
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import TRIMMED, Merging
from jlora.merging.engine.streamed import Rule, Solver, Sparsify, factor
from jlora.merging.engine.threshold import Density


def ties(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.2, vote: str = "sum",
    normalize: bool = True, scale: Float[Array, ""] | float = 1.0, rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """TIES on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      density: share of the elements of each adapter that is kept, in (0, 1]; one number, or one
        for each adapter; 0.2, as in the paper.
      vote: "sum" (the paper's: larger elements have more say), or "count".
      normalize: divide by the sum of |w_n| of those that agree; True: the paper's disjoint mean.
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: a density or a rank out of range, or an unknown vote.
    """
    solver = solver or Solver()
    rule = ties_rule(
        bank, weights, density=density, vote=vote, normalize=normalize, scale=scale,
        block=solver.block,
    )  # fmt: skip
    return factor(bank, rule, rank, solver)


def ties_rule(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.2, vote: str = "sum",
    normalize: bool = True, scale: Float[Array, ""] | float = 1.0, block: int | None = None,
) -> Rule:  # fmt: skip
    """M by row blocks.

    Args are those of `ties`.

    Args:
      block: rows at a time; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    trim = trimmed(bank, density, block)
    return partial(voted, trim, weights, scale, vote=vote, normalize=normalize)


def trimmed(bank: LowRank, density: Density, block: int | None = None) -> Sparsify:
    """The sparsification that keeps the largest elements of each delta.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      density: share of the elements that is kept, in (0, 1]; one number, or one for each adapter.
      block: rows that are read at a time for the thresholds; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: the deltas, sparse.
    """
    (n, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    k = threshold.kept(density, n, d_in * d_out)
    if threshold.is_one(density):
        return partial(everything)
    return partial(_largest, threshold.kth_largest(bank, threshold.magnitude, k, block=block))


def _largest(t: Array, d: Array, numbers: Array) -> Array:
    return jnp.where(threshold.above(jnp.abs(d), t), d, jnp.zeros_like(d))


SYSTEM = Merging(
    name="ties",
    paper="Yadav 2023, 2306.01708",
    symbol="ties",
    claim="ties",
    function=ties,
    loop="map",
    options={"density": 0.5},
    rule=ties_rule,
    breaks={
        "weight_one": TRIMMED,
        "idempotent": TRIMMED,
    },
    evidence="dense numpy value, limits, the paper's claim in small; law suite",
)
