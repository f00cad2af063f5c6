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

from typing import Any

import jax.numpy as jnp
from jax import Array

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import elect
from jlora.merging.engine.streamed import Rule, Solver, factor


def ties(
    bank: LowRank, weights: Array, *, rank: int | None = None, solver: Solver | None = None,
    **options: Any,
) -> LowRank:  # fmt: skip
    """TIES on one site; `options` are those of `ties_rule`."""
    return factor(bank, ties_rule(bank, weights, **options), rank, solver)


def ties_rule(
    bank: LowRank, weights: Array, *, density: Any = 0.2, vote: str = "sum",
    normalise: bool = True, scale: float = 1.0, block: int | None = None,
) -> Rule:  # fmt: skip
    """M by row blocks. `density` is a number or one for each adapter; `block` as in `Solver`."""
    trim = trimmed(bank, density, block)

    def rule(d: Array, numbers: Array) -> Array:
        return scale * elect(trim(d), weights, vote=vote, normalise=normalise)

    return rule


def trimmed(bank: LowRank, density: Any, block: int | None = None) -> Any:
    """The function [N, b, d_out] -> the same without all but the largest elements."""
    (n, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    k = threshold.kept(density, n, d_in * d_out)
    if threshold.is_one(density):
        return lambda d: d
    t = threshold.kth_largest(bank, threshold.magnitude, k, block=block)
    return lambda d: jnp.where(threshold.above(jnp.abs(d), t), d, jnp.zeros_like(d))
