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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from jlora.algebra import LowRank
from jlora.merging.engine import threshold
from jlora.merging.engine.election import everything, shared, summed, voted
from jlora.merging.engine.masks import STEPS, dropped
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import DROPPED, Merging
from jlora.merging.engine.streamed import Rule, Solver, Sparsify, factor
from jlora.merging.engine.threshold import Density


def dare_linear(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: Density = 0.2,
    normalize: bool = False,
    scale: Float[Array, ""] | float = 1.0,
    rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """DARE with a weighted sum, on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      keys: [N], one for each adapter (and site, and slice), of the random masks.
      density: share of the elements of each adapter that is kept, in [2^-16, 1]; one number, or
        one for each adapter; 0.2 (the paper drops 0.5 to 0.99 of them).
      normalize: divide by sum |w_n|; False: a sum, as in mergekit.
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: a density or a rank out of range.
    """
    rule = dare_linear_rule(
        bank, weights, keys=keys, density=density, normalize=normalize, scale=scale
    )
    return factor(bank, rule, rank, solver)


def dare_ties(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: Density = 0.2,
    vote: str = "sum",
    normalize: bool = True,
    scale: Float[Array, ""] | float = 1.0,
    rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """DARE with the vote of TIES, on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      keys: [N], one for each adapter (and site, and slice), of the random masks.
      density: share of the elements of each adapter that is kept, in [2^-16, 1]; one number, or
        one for each adapter; 0.2 (the paper drops 0.5 to 0.99 of them).
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
      ValueError: a density or a rank out of range, or an unknown vote.
    """
    rule = dare_ties_rule(
        bank, weights, keys=keys, density=density, vote=vote, normalize=normalize, scale=scale
    )
    return factor(bank, rule, rank, solver)


def dare_linear_rule(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: Density = 0.2,
    normalize: bool = False,
    scale: Float[Array, ""] | float = 1.0,
) -> Rule:
    """M_linear by row blocks.

    Args are those of `dare_linear`.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    return partial(summed, dropping(bank, density, keys), shared(weights, normalize), scale)


def dare_ties_rule(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: Density = 0.2,
    vote: str = "sum",
    normalize: bool = True,
    scale: Float[Array, ""] | float = 1.0,
) -> Rule:
    """M_ties by row blocks.

    Args are those of `dare_ties`.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: M's rows [b, d_out].
    """
    drop = dropping(bank, density, keys)
    return partial(voted, drop, weights, scale, vote=vote, normalize=normalize)


def dropping(bank: LowRank, density: Density, keys: Key[Array, "n"]) -> Sparsify:
    """The sparsification that drops elements at random and rescales the rest.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      density: share that is kept, in [2^-16, 1]; one number, or one for each adapter.
      keys: one for each adapter.

    Returns:
      A function of deltas [N, b, d_out] and row numbers [b]: the deltas, masked and rescaled.
    """
    keep = shares(density, bank.u.shape[0])
    if threshold.is_one(density):
        return partial(everything)
    return partial(_masked, keep, keys)


def _masked(keep: Array, keys: Array, d: Array, numbers: Array) -> Array:
    return dropped(d, keep[:, None, None], keys, numbers)


def shares(density: Density, adapters: int) -> Array:
    """Keep probabilities of all adapters, checked unless they are a traced array.

    Args:
      density: one number, or one for each adapter, in [2^-16, 1].
      adapters: N.

    Returns:
      [N] float32.

    Raises:
      ValueError: a density out of range, or another number of them.
    """
    if isinstance(density, jax.Array):
        return jnp.broadcast_to(density.astype(jnp.float32), (adapters,))
    p = np.asarray(density, np.float32)
    if p.shape not in {(), (adapters,)} or not ((p >= 1 / STEPS) & (p <= 1)).all():
        raise ValueError(f"density: got {density}, expected in [2^-16, 1], one or {adapters}")
    return jnp.broadcast_to(jnp.asarray(p), (adapters,))


SYSTEMS = (
    Merging(
        name="dare_linear",
        paper="Yu 2023, 2311.03099",
        symbol="dare_linear",
        claim="dare_linear",
        function=dare_linear,
        randomised=True,
        loop="map",
        options={"density": 0.5},
        rule=dare_linear_rule,
        breaks={
            "weight_one": DROPPED,
            "idempotent": DROPPED,
        },
        evidence="dense numpy value, limits, the paper's claim in small; law suite",
    ),
    Merging(
        name="dare_ties",
        paper="Yu 2023, 2311.03099",
        symbol="dare_ties",
        claim="dare_ties",
        function=dare_ties,
        randomised=True,
        loop="map",
        options={"density": 0.5},
        rule=dare_ties_rule,
        breaks={
            "weight_one": DROPPED,
            "idempotent": DROPPED,
        },
        evidence="dense numpy value, limits, the paper's claim in small; law suite",
    ),
)
