"""Model breadcrumbs: drop the largest elements of each delta as outliers, and the small ones.

==========  ======================================================================
D_n         delta of adapter n, [d_in, d_out], with n = d_in * d_out elements
t_n, T_n    the (a + k)-th and the a-th largest of |D_n|
k           floor(density * n), kept; at most what is left
a           floor(gamma * n), the outliers; fewer if k needs them
elect       the vote of `election.py`
scale       lambda, of the result
==========  ======================================================================

.. math::
    X_n = [\\, t_n \\le |D_n| < T_n \\,] D_n, \\qquad
    M = \\lambda \\sum_n w_n X_n \\;\\text{ or }\\; \\lambda \\, \\text{elect}(w, X)

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a density outside (0, 1], gamma outside [0, 1), a rank out of range.

Paper: Davari and Belilovsky 2023, arXiv:2312.06795.
Source: paper; density and gamma as in mergekit (formula only).
Deviates: elements equal to a threshold are on its upper side together.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import elect, weighted
from jlora.merging.engine.streamed import Rule, Solver, factor


def breadcrumbs(
    bank: LowRank, weights: Array, *, rank: int | None = None, solver: Solver | None = None,
    **options: Any,
) -> LowRank:  # fmt: skip
    """Breadcrumbs with a weighted sum, on one site; `options` of `breadcrumbs_rule`."""
    return factor(bank, breadcrumbs_rule(bank, weights, **options), rank, solver)


def breadcrumbs_ties(
    bank: LowRank, weights: Array, *, rank: int | None = None, solver: Solver | None = None,
    **options: Any,
) -> LowRank:  # fmt: skip
    """Breadcrumbs with the vote of TIES, on one site; `options` of `breadcrumbs_ties_rule`."""
    return factor(bank, breadcrumbs_ties_rule(bank, weights, **options), rank, solver)


def breadcrumbs_rule(
    bank: LowRank, weights: Array, *, density: Any = 0.85, gamma: float = 0.01,
    scale: float = 1.0, block: int | None = None,
) -> Rule:  # fmt: skip
    """M of the weighted sum by row blocks; `density` is a number or one for each adapter."""
    band = banded(bank, density, gamma, block)
    return lambda d, numbers: scale * weighted(band(d), weights)


def breadcrumbs_ties_rule(
    bank: LowRank, weights: Array, *, density: Any = 0.85, gamma: float = 0.01,
    vote: str = "sum", normalise: bool = True, scale: float = 1.0, block: int | None = None,
) -> Rule:  # fmt: skip
    """M of the vote by row blocks; `density` is a number or one for each adapter."""
    band = banded(bank, density, gamma, block)

    def rule(d: Array, numbers: Array) -> Array:
        return scale * elect(band(d), weights, vote=vote, normalise=normalise)

    return rule


def banded(bank: LowRank, density: Any, gamma: float, block: int | None = None) -> Any:
    """The function [N, b, d_out] -> the same without outliers and small elements."""
    (n, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma: got {gamma}, expected 0 <= gamma < 1")
    size = d_in * d_out
    k = threshold.kept(density, n, size)
    if threshold.is_one(density):
        return lambda d: d
    top = jnp.minimum(jnp.full_like(k, int(gamma * size)), size - k)
    both = jnp.concatenate([top + k, jnp.maximum(top, 1)])
    t = threshold.kth_largest(bank, lambda d: jnp.concatenate([jnp.abs(d)] * 2), both, block=block)
    high = jnp.where(top > 0, t[n:], jnp.full_like(t[n:], jnp.inf))

    def band(d: Array) -> Array:
        x = jnp.abs(d)
        inside = threshold.above(x, t[:n]) & ~threshold.above(x, high)
        return jnp.where(inside, d, jnp.zeros_like(d))

    return band
