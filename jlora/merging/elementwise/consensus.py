"""Consensus merging: keep the elements of the merged delta that at least `least` tasks use.

==========  ==================================================================
D_n         delta of adapter n, [d_in, d_out]
T           the merged delta, lambda * sum of w_n D_n
b_n         task mask: task n uses the element
mu          `sharpness` (the paper's lambda_t): larger is sparser
==========  ==================================================================

.. math::
    b_n = [\\, |D_n| \\ge \\mu \\, |T - D_n| \\,], \\qquad
    M = [\\, \\sum_n b_n \\ge \\text{least} \\,] \\; T, \\qquad M \\approx U V

An element that only one task uses is selfish, one that none uses is catastrophic: both go.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, rank], v [rank, d_out].

Raises ValueError for a negative sharpness, `least` outside 0..N, a rank out of range.

Paper: Wang et al. 2024, arXiv:2405.07813 (TALL masks; consensus task arithmetic).
Source: paper.
Deviates: the masks come from the weighted sum, so with weights 1 they are the paper's.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jlora.algebra import LowRank
from jlora.merging.engine.election import weighted
from jlora.merging.engine.streamed import Rule, Solver, factor


def consensus(
    bank: LowRank, weights: Array, *, rank: int | None = None, solver: Solver | None = None,
    **options: Any,
) -> LowRank:  # fmt: skip
    """Consensus task arithmetic on one site; `options` are those of `consensus_rule`."""
    return factor(bank, consensus_rule(bank, weights, **options), rank, solver)


def consensus_rule(
    bank: LowRank, weights: Array, *, sharpness: float = 0.4, least: int = 2, scale: float = 1.0
) -> Rule:
    """M by row blocks."""
    n = bank.u.shape[0]
    if sharpness < 0:
        raise ValueError(f"sharpness: got {sharpness}, expected at least 0")
    if not 0 <= least <= n:
        raise ValueError(f"least: got {least}, expected 0 to {n}, the number of adapters")

    def rule(d: Array, numbers: Array) -> Array:
        total = scale * weighted(d, weights)
        uses = task_masks(d, total, sharpness)
        return jnp.where(jnp.sum(uses, axis=0) >= least, total, jnp.zeros_like(total))

    return rule


def task_masks(d: Array, total: Array, sharpness: float) -> Array:
    """The elements that each task uses, [N, b, d_out] int32."""
    return (jnp.abs(d) >= sharpness * jnp.abs(total[None] - d)).astype(jnp.int32)
