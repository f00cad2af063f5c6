"""DELLA: drop elements at random, the small ones of each output more often, then merge.

==========  =========================================================================
D_n         delta of adapter n, [d_in, d_out]
rank_nij    rank of |D_nij| among the d_in elements of output j, 0 for the smallest
p_nij       keep probability, density - epsilon .. density + epsilon
elect       the vote of `election.py`
scale       lambda, of the result
==========  =========================================================================

.. math::
    p_{nij} = \\rho - \\epsilon + 2 \\epsilon \\frac{rank_{nij}}{d_{in} - 1}, \\qquad
    X_{nij} = \\frac{D_{nij}}{p_{nij}} \\text{ with probability } p_{nij}, \\text{ else } 0

.. math:: M = \\lambda \\, \\text{elect}(w, X) \\;\\text{ or }\\; \\lambda \\sum_n w_n X_n

Streamed by outputs: a block holds all inputs of b outputs, since ranks are within an output.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; keys [N], one for each (site, slice,
adapter); result u [d_in, rank], v [rank, d_out].

Raises ValueError unless 0 < density - epsilon and density + epsilon < 1 (or density 1).

Paper: Deep et al. 2024, arXiv:2406.11617.
Source: paper; linear ranks, epsilon and the vote as in mergekit (formula only).
Deviates: rescales each element by its own probability, as the paper does and mergekit does not
(it keeps the l1 norm); probabilities are rounded to multiples of 2^-16.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Key

from jlora.algebra import LowRank
from jlora.merging.engine.election import everything, shared, summed, voted
from jlora.merging.engine.masks import dropped
from jlora.merging.engine.partial import partial
from jlora.merging.engine.record import DROPPED, Merging
from jlora.merging.engine.streamed import Rule, Solver, Sparsify, factor, flip


def della(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: float = 0.5,
    epsilon: float = 0.15,
    vote: str = "sum",
    normalize: bool = True,
    scale: Float[Array, ""] | float = 1.0,
    rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """DELLA with the vote of TIES, on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      keys: [N], one for each adapter (and site, and slice), of the random masks.
      density: mean share that is kept; 0.5.
      epsilon: half the width of the range of keep probabilities, 0 < density - epsilon and
        density + epsilon < 1 (or density 1, which keeps all); 0.15, as in mergekit.
      vote: "sum" (larger elements have more say), or "count".
      normalize: divide by the sum of |w_n| of those that agree; True, as in mergekit.
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank], v [rank, d_out] with orthonormal rows.

    Raises:
      ValueError: density and epsilon, or a rank, out of range, or an unknown vote.
    """
    turned = flip(bank)
    rule = della_rule(
        turned, weights, keys=keys, density=density, epsilon=epsilon, vote=vote,
        normalize=normalize, scale=scale,
    )  # fmt: skip
    return flip(factor(turned, rule, rank, solver))


def della_linear(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    keys: Key[Array, "n"],
    density: float = 0.5,
    epsilon: float = 0.15,
    normalize: bool = False,
    scale: Float[Array, ""] | float = 1.0,
    rank: int | None = None,
    solver: Solver | None = None,
) -> LowRank:
    """DELLA with a weighted sum, on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      keys: [N], one for each adapter (and site, and slice), of the random masks.
      density: mean share that is kept; 0.5.
      epsilon: half the width of the range of keep probabilities, 0 < density - epsilon and
        density + epsilon < 1 (or density 1, which keeps all); 0.15, as in mergekit.
      normalize: divide by sum |w_n|; False: a sum, as in mergekit.
      scale: lambda, a factor of the result; 1, as in mergekit.
      rank: of the result, 1 to min(d_in, d_out); None: N R, at most full, which loses nothing of a
        weighted sum, but something of an element-wise merge (`run.certified` says how much).
      solver: how M is read, in passes over row blocks; None: `Solver()`.

    Returns:
      u [d_in, rank], v [rank, d_out] with orthonormal rows.

    Raises:
      ValueError: density and epsilon, or a rank, out of range.
    """
    turned = flip(bank)
    rule = della_linear_rule(
        turned, weights, keys=keys, density=density, epsilon=epsilon, normalize=normalize,
        scale=scale,
    )  # fmt: skip
    return flip(factor(turned, rule, rank, solver))


def della_rule(
    turned: LowRank, weights: Float[Array, "n"], *, keys: Key[Array, "n"], density: float = 0.5,
    epsilon: float = 0.15, vote: str = "sum", normalize: bool = True,
    scale: Float[Array, ""] | float = 1.0,
) -> Rule:  # fmt: skip
    """M^T of the vote by blocks of outputs.

    Args are those of `della`.

    Args:
      turned: the transposed bank, u [N, d_out, R], v [N, R, d_in].

    Returns:
      A function of deltas [N, b, d_in] and output numbers [b]: rows of M^T [b, d_in].
    """
    drop = magprune(density, epsilon, keys)
    return partial(voted, drop, weights, scale, vote=vote, normalize=normalize)


def della_linear_rule(
    turned: LowRank, weights: Float[Array, "n"], *, keys: Key[Array, "n"], density: float = 0.5,
    epsilon: float = 0.15, normalize: bool = False, scale: Float[Array, ""] | float = 1.0,
) -> Rule:  # fmt: skip
    """M^T of the weighted sum by blocks of outputs.

    Args are those of `della_linear`.

    Args:
      turned: the transposed bank, u [N, d_out, R], v [N, R, d_in].

    Returns:
      A function of deltas [N, b, d_in] and output numbers [b]: rows of M^T [b, d_in].
    """
    return partial(summed, magprune(density, epsilon, keys), shared(weights, normalize), scale)


def magprune(density: float, epsilon: float, keys: Key[Array, "n"]) -> Sparsify:
    """The sparsification that drops small elements of an output more often, and rescales.

    Args:
      density: mean share that is kept.
      epsilon: half the width of the range of keep probabilities.
      keys: one for each adapter.

    Returns:
      A function of deltas [N, b, d_in] and output numbers [b]: the deltas, sparse.

    Raises:
      ValueError: density and epsilon out of range.
    """
    if density == 1.0:
        return partial(everything)
    if epsilon < 0 or not (0 < density - epsilon and density + epsilon < 1):
        raise ValueError(
            f"density, epsilon: got {density}, {epsilon}, expected density +- epsilon in (0, 1)"
        )
    return partial(_by_rank, keys, density=float(density), epsilon=float(epsilon))


def _by_rank(keys: Array, d: Array, numbers: Array, *, density: float, epsilon: float) -> Array:
    order = jnp.argsort(lax.stop_gradient(jnp.abs(d)), axis=-1)
    place = jnp.argsort(order, axis=-1).astype(jnp.float32) / max(d.shape[-1] - 1, 1)
    return dropped(d, density - epsilon + 2.0 * epsilon * place, keys, numbers)


SYSTEMS = (
    Merging(
        name="della",
        paper="Deep 2024, 2406.11617",
        symbol="della",
        claim="della",
        function=della,
        randomised=True,
        loop="map",
        options={"density": 0.5},
        rule=della_rule,
        by_outputs=True,
        breaks={
            "weight_one": DROPPED,
            "idempotent": DROPPED,
        },
        evidence="dense numpy value, limits, the paper's claim in small; law suite",
    ),
    Merging(
        name="della_linear",
        paper="Deep 2024, 2406.11617",
        symbol="della_linear",
        claim="della_linear",
        function=della_linear,
        randomised=True,
        loop="map",
        options={"density": 0.5},
        rule=della_linear_rule,
        by_outputs=True,
        breaks={
            "weight_one": DROPPED,
            "idempotent": DROPPED,
        },
        evidence="dense numpy value, limits, the paper's claim in small; law suite",
    ),
)
