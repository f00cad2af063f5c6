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

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jlora.algebra import LowRank
from jlora.merging.engine.election import elect, weighted
from jlora.merging.engine.masks import dropped
from jlora.merging.engine.streamed import Rule, Solver, factor, flip


def della(
    bank: LowRank, weights: Array, *, keys: Array, rank: int | None = None,
    solver: Solver | None = None, **options: Any,
) -> LowRank:  # fmt: skip
    """DELLA with the vote of TIES, on one site; `options` are those of `della_rule`."""
    turned = flip(bank)
    return flip(factor(turned, della_rule(turned, weights, keys=keys, **options), rank, solver))


def della_linear(
    bank: LowRank, weights: Array, *, keys: Array, rank: int | None = None,
    solver: Solver | None = None, density: float = 0.5, epsilon: float = 0.15, scale: float = 1.0,
) -> LowRank:  # fmt: skip
    """DELLA with a weighted sum, on one site."""
    drop = magprune(density, epsilon, keys)
    turned = flip(bank)
    return flip(
        factor(turned, lambda d, rows: scale * weighted(drop(d, rows), weights), rank, solver)
    )


def della_rule(
    turned: LowRank, weights: Array, *, keys: Array, density: float = 0.5,
    epsilon: float = 0.15, vote: str = "sum", normalise: bool = True, scale: float = 1.0,
) -> Rule:  # fmt: skip
    """M^T by blocks of outputs, of the transposed bank."""
    drop = magprune(density, epsilon, keys)

    def rule(d: Array, numbers: Array) -> Array:
        return scale * elect(drop(d, numbers), weights, vote=vote, normalise=normalise)

    return rule


def magprune(density: float, epsilon: float, keys: Array) -> Any:
    """The function ([N, b, d_in], [b] outputs) -> the same, dropped by rank and rescaled."""
    if density == 1.0:
        return lambda d, numbers: d
    if epsilon < 0 or not (0 < density - epsilon and density + epsilon < 1):
        raise ValueError(
            f"density, epsilon: got {density}, {epsilon}, expected density +- epsilon in (0, 1)"
        )

    def drop(d: Array, numbers: Array) -> Array:
        order = jnp.argsort(lax.stop_gradient(jnp.abs(d)), axis=-1)
        place = jnp.argsort(order, axis=-1).astype(jnp.float32) / max(d.shape[-1] - 1, 1)
        return dropped(d, density - epsilon + 2.0 * epsilon * place, keys, numbers)

    return drop
