"""FlexLoRA: the exact average of the deltas, cut by SVD to the rank of each client.

===========  =====================================================
u_k, v_k     factors of client k, zero-padded to a common rank
p_k, r_k     its share (sums to 1) and its rank
U, S, V      singular value decomposition of the average
===========  =====================================================

.. math:: U S V^T = \\sum_k p_k u_k v_k, \\qquad
          u_k' = U_{:r_k} S_{:r_k}^{1/2}, \\; v_k' = S_{:r_k}^{1/2} V_{:r_k}^T

Every client gets the best approximation of the average at its own rank.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [N, d_in, R'], v [N, R', d_out]
with R' the largest of `ranks` and zeros beyond a client's rank.

Paper: Bai et al. 2024, arXiv:2402.11505.
Source: abstract; the square root of S on both sides is original to jlora.
Deviates: the SVD runs in the core space of all factors, no average is formed.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora import algebra
from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.merging.exact.concat import concat


def flexlora(bank: LowRank, weights: Float[Array, "n"], *, ranks: Sequence[int]) -> LowRank:
    """One adapter per client rank, zero-padded to the largest.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: shares, summing to 1.
      ranks: of the clients, each at least 1.

    Returns:
      u [N, d_in, R'], v [N, R', d_out], R' the largest rank that is useful.

    Raises:
      ValueError: a rank < 1.
    """
    if min(ranks, default=0) < 1:
        raise ValueError(f"ranks: got {tuple(ranks)}, expected each at least 1")
    u, v = algebra.low_rank(algebra.truncate({"": concat(bank, weights)}, max(ranks)).deltas[""])
    return cut(LowRank(u, v), ranks)


def cut(x: LowRank, ranks: Sequence[int]) -> LowRank:
    """The leading columns and rows of one adapter for each rank, zeros beyond.

    Args:
      x: u [d_in, R], v [R, d_out].
      ranks: of the clients.

    Returns:
      u [N, d_in, R], v [N, R, d_out].
    """
    r = x.u.shape[-1]
    live = jnp.arange(r)[None, :] < jnp.asarray(ranks)[:, None]
    return LowRank(
        x.u[None] * live[:, None, :].astype(x.u.dtype),
        jnp.broadcast_to(x.v, (len(ranks), *x.v.shape)) * live[:, :, None].astype(x.v.dtype),
    )


def _whole(bank: LowRank, weights: Array) -> Round:
    """What a client of the largest useful rank gets: nothing is cut."""
    rank = min(bank.u.shape[-2], bank.v.shape[-1])
    u, v = flexlora(bank, weights, ranks=(rank,))
    return Round(LowRank(u[0], v[0]))


SYSTEM = Aggregation(
    name="FlexLoRA",
    paper="Bai 2024, 2402.11505",
    symbol="flexlora",
    claim="flexlora",
    evidence="best of each rank by dense SVD; mutation check",
    kind="composition",
    aggregate=_whole,
    exact=True,
)
