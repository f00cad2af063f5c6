"""Magnitude pruning: a weighted sum of deltas of which only the largest elements are kept.

=======  ====================================================================
D_n      delta of adapter n, [d_in, d_out]
t_n      the k-th largest of |D_n|, k = floor(density * d_in * d_out)
scale    lambda, of the result
=======  ====================================================================

.. math:: M = \\lambda \\sum_n w_n \\, [\\,|D_n| \\ge t_n\\,] \\, D_n, \\qquad M \\approx U V

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a density outside (0, 1], a rank out of range.

Paper: the trimming of TIES alone, Yadav et al. 2023, arXiv:2306.01708.
Source: paper; PEFT's `magnitude_prune_svd` is the same formula.
Deviates: elements equal to the threshold are all kept.
"""

from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.elementwise.ties import trimmed
from jlora.merging.engine.election import shared, summed
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import TRIMMED, Merging
from jlora.merging.engine.streamed import Rule, Solver, factor
from jlora.merging.engine.threshold import Density


def magnitude(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.2, normalize: bool = False,
    scale: Float[Array, ""] | float = 1.0, rank: int | None = None, solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """The pruned sum of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      density: share of the elements of each adapter that is kept, in (0, 1]; one number, or one
        for each adapter; 0.2, as in TIES.
      normalize: divide by sum |w_n|; False: a sum.
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
    rule = magnitude_rule(
        bank, weights, density=density, normalize=normalize, scale=scale, block=solver.block
    )
    return factor(bank, rule, rank, solver)


def magnitude_rule(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.2, normalize: bool = False,
    scale: Float[Array, ""] | float = 1.0, block: int | None = None,
) -> Rule:  # fmt: skip
    """M by row blocks.

    Args are those of `magnitude`.

    Args:
      block: rows at a time; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    return partial(summed, trimmed(bank, density, block), shared(weights, normalize), scale)


SYSTEM = Merging(
    name="magnitude",
    paper="Yadav 2023, 2306.01708 (trimming alone)",
    symbol="magnitude",
    claim="magnitude",
    function=magnitude,
    loop="map",
    options={"density": 0.5},
    rule=magnitude_rule,
    breaks={
        "weight_one": TRIMMED,
        "idempotent": TRIMMED,
    },
    evidence="dense numpy value, limits, the paper's claim in small; law suite",
)
