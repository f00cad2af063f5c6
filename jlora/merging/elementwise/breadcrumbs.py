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

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import everything, shared, summed, voted
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import TRIMMED, Merging
from jlora.merging.engine.streamed import Rule, Solver, Sparsify, factor
from jlora.merging.engine.threshold import Density


def breadcrumbs(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.85, gamma: float = 0.01,
    normalize: bool = False, scale: Float[Array, ""] | float = 1.0, rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """Breadcrumbs with a weighted sum, on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      density: share of the elements of each adapter that is kept, in (0, 1]; one number, or one
        for each adapter; 0.85.
      gamma: share of the largest elements that is dropped as outliers, in [0, 1); 0.01, as in
        mergekit.
      normalize: divide by sum |w_n|; False: a sum, as in mergekit.
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: a density, gamma or a rank out of range.
    """
    solver = solver or Solver()
    rule = breadcrumbs_rule(
        bank, weights, density=density, gamma=gamma, normalize=normalize, scale=scale,
        block=solver.block,
    )  # fmt: skip
    return factor(bank, rule, rank, solver)


def breadcrumbs_ties(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.85, gamma: float = 0.01,
    vote: str = "sum", normalize: bool = True, scale: Float[Array, ""] | float = 1.0,
    rank: int | None = None, solver: Solver | None = None,
) -> LowRank:  # fmt: skip
    """Breadcrumbs with the vote of TIES, on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      density: share of the elements of each adapter that is kept, in (0, 1]; one number, or one
        for each adapter; 0.85.
      gamma: share of the largest elements that is dropped as outliers, in [0, 1); 0.01, as in
        mergekit.
      vote: "sum" (larger elements have more say), or "count".
      normalize: divide by the sum of |w_n| of those that agree; True, as in TIES (mergekit's
        default for this method is False).
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: a density, gamma or a rank out of range, or an unknown vote.
    """
    solver = solver or Solver()
    rule = breadcrumbs_ties_rule(
        bank, weights, density=density, gamma=gamma, vote=vote, normalize=normalize, scale=scale,
        block=solver.block,
    )  # fmt: skip
    return factor(bank, rule, rank, solver)


def breadcrumbs_rule(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.85, gamma: float = 0.01,
    normalize: bool = False, scale: Float[Array, ""] | float = 1.0, block: int | None = None,
) -> Rule:  # fmt: skip
    """M of the weighted sum by row blocks.

    Args are those of `breadcrumbs`; `block` is how many rows a `Solver` reads at a time.

    Args:
      block: rows at a time; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    band = banded(bank, density, gamma, block)
    return partial(summed, band, shared(weights, normalize), scale)


def breadcrumbs_ties_rule(
    bank: LowRank, weights: Float[Array, "n"], *, density: Density = 0.85, gamma: float = 0.01,
    vote: str = "sum", normalize: bool = True, scale: Float[Array, ""] | float = 1.0,
    block: int | None = None,
) -> Rule:  # fmt: skip
    """M of the vote by row blocks.

    Args are those of `breadcrumbs_ties`.

    Args:
      block: rows at a time; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    band = banded(bank, density, gamma, block)
    return partial(voted, band, weights, scale, vote=vote, normalize=normalize)


def banded(bank: LowRank, density: Density, gamma: float, block: int | None = None) -> Sparsify:
    """The sparsification that drops outliers and small elements.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      density: share of the elements that is kept, in (0, 1]; one number, or one for each adapter.
      gamma: share of the largest elements that is dropped, in [0, 1).
      block: rows that are read at a time for the thresholds; None: as many as the solver takes.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: the deltas, sparse.

    Raises:
      ValueError: gamma out of range.
    """
    (n, d_in, _), d_out = bank.u.shape, bank.v.shape[-1]
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma: got {gamma}, expected 0 <= gamma < 1")
    size = d_in * d_out
    k = threshold.kept(density, n, size)
    if threshold.is_one(density):
        return partial(everything)
    top = jnp.minimum(jnp.full_like(k, int(gamma * size)), size - k)
    both = jnp.concatenate([top + k, jnp.maximum(top, 1)])
    t = threshold.kth_largest(bank, lambda d: jnp.concatenate([jnp.abs(d)] * 2), both, block=block)
    high = jnp.where(top > 0, t[n:], jnp.full_like(t[n:], jnp.inf))
    return partial(_band, t[:n], high)


def _band(low: Array, high: Array, d: Array, numbers: Array) -> Array:
    x = jnp.abs(d)
    inside = threshold.above(x, low) & ~threshold.above(x, high)
    return jnp.where(inside, d, jnp.zeros_like(d))


SYSTEMS = (
    Merging(
        name="breadcrumbs",
        paper="Davari 2023, 2312.06795",
        symbol="breadcrumbs",
        claim="breadcrumbs",
        function=breadcrumbs,
        loop="map",
        options={"density": 0.5},
        rule=breadcrumbs_rule,
        breaks={
            "weight_one": TRIMMED,
            "idempotent": TRIMMED,
        },
        evidence="dense numpy value, limits, the paper's claim in small; law suite",
    ),
    Merging(
        name="breadcrumbs_ties",
        paper="Davari 2023, 2312.06795",
        symbol="breadcrumbs_ties",
        claim="breadcrumbs_ties",
        function=breadcrumbs_ties,
        loop="map",
        options={"density": 0.5},
        rule=breadcrumbs_ties_rule,
        breaks={
            "weight_one": TRIMMED,
            "idempotent": TRIMMED,
        },
        evidence="dense numpy value, limits, the paper's claim in small; law suite",
    ),
)
