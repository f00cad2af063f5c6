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

from typing import Any

from jax import Array

from jlora.algebra import LowRank
from jlora.merging.elementwise.ties import trimmed
from jlora.merging.engine.election import weighted
from jlora.merging.engine.streamed import Rule, Solver, factor


def magnitude(
    bank: LowRank, weights: Array, *, rank: int | None = None, solver: Solver | None = None,
    **options: Any,
) -> LowRank:  # fmt: skip
    """The pruned sum of one site; `options` are those of `magnitude_rule`."""
    return factor(bank, magnitude_rule(bank, weights, **options), rank, solver)


def magnitude_rule(
    bank: LowRank, weights: Array, *, density: Any = 0.2, scale: float = 1.0,
    block: int | None = None,
) -> Rule:  # fmt: skip
    """M by row blocks. `density` is a number or one for each adapter; `block` as in `Solver`."""
    trim = trimmed(bank, density, block)
    return lambda d, numbers: scale * weighted(trim(d), weights)
