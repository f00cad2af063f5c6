"""DARE: drop elements of each delta at random, rescale the rest, then merge.

==========  ====================================================================
D_n         delta of adapter n, [d_in, d_out]
m_n         mask of adapter n: 1/p with probability p, else 0 (`masks.py`)
p           `density`, the share that is kept
elect       the vote of `election.py`
scale       lambda, of the result
==========  ====================================================================

.. math::
    M_{linear} = \\lambda \\sum_n w_n \\, m_n \\circ D_n, \\qquad
    M_{ties} = \\lambda \\, \\text{elect}(w, m_n \\circ D_n), \\qquad M \\approx U V

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; keys [N], one for each (site, slice,
adapter); result u [d_in, rank], v [rank, d_out].

Raises ValueError for a density outside [2^-16, 1], a rank out of range, an unknown vote.

Paper: Yu et al. 2023, arXiv:2311.03099.
Source: paper; the vote is TIES's, weights as in mergekit (formula only).
Deviates: the density is rounded to a multiple of 2^-16, and the rescaling is that of the rounded.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import elect, weighted
from jlora.merging.engine.masks import STEPS, dropped
from jlora.merging.engine.streamed import Rule, Solver, factor


def dare_linear(
    bank: LowRank, weights: Array, *, keys: Array, rank: int | None = None,
    solver: Solver | None = None, **options: Any,
) -> LowRank:  # fmt: skip
    """DARE with a weighted sum, on one site; `options` are those of `dare_linear_rule`."""
    return factor(bank, dare_linear_rule(bank, weights, keys=keys, **options), rank, solver)


def dare_ties(
    bank: LowRank, weights: Array, *, keys: Array, rank: int | None = None,
    solver: Solver | None = None, **options: Any,
) -> LowRank:  # fmt: skip
    """DARE with the vote of TIES, on one site; `options` are those of `dare_ties_rule`."""
    return factor(bank, dare_ties_rule(bank, weights, keys=keys, **options), rank, solver)


def dare_linear_rule(
    bank: LowRank, weights: Array, *, keys: Array, density: Any = 0.2, scale: float = 1.0
) -> Rule:
    """M_linear by row blocks. `density` is a number or one for each adapter."""
    drop = dropping(bank, density, keys)
    return lambda d, numbers: scale * weighted(drop(d, numbers), weights)


def dare_ties_rule(
    bank: LowRank, weights: Array, *, keys: Array, density: Any = 0.2, vote: str = "sum",
    normalise: bool = True, scale: float = 1.0,
) -> Rule:  # fmt: skip
    """M_ties by row blocks. `density` is a number or one for each adapter."""
    drop = dropping(bank, density, keys)

    def rule(d: Array, numbers: Array) -> Array:
        return scale * elect(drop(d, numbers), weights, vote=vote, normalise=normalise)

    return rule


def dropping(bank: LowRank, density: Any, keys: Array) -> Any:
    """The function ([N, b, d_out], [b]) -> the same, masked and rescaled."""
    keep = shares(density, bank.u.shape[0])
    if threshold.is_one(density):
        return lambda d, numbers: d
    return lambda d, numbers: dropped(d, keep[:, None, None], keys, numbers)


def shares(density: Any, adapters: int) -> Array:
    """Keep probabilities [N] float32, checked unless they are a traced array."""
    if isinstance(density, jax.Array):
        return jnp.broadcast_to(density.astype(jnp.float32), (adapters,))
    p = np.asarray(density, np.float32)
    if p.shape not in {(), (adapters,)} or not ((p >= 1 / STEPS) & (p <= 1)).all():
        raise ValueError(f"density: got {density}, expected in [2^-16, 1], one or {adapters}")
    return jnp.broadcast_to(jnp.asarray(p), (adapters,))
