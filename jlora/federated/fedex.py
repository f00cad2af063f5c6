"""FedEx-LoRA: factors are averaged, and what that loses goes into the frozen weight.

========  =====================================================
u_k, v_k  factors of client k, [d_in, R], [R, d_out]
p_k       its share, sums to 1
E         the residual, added to W once a round by everyone
========  =====================================================

.. math:: \\bar u = \\sum_k p_k u_k, \\quad \\bar v = \\sum_k p_k v_k, \\quad
          E = \\sum_k p_k u_k v_k - \\bar u \\bar v, \\qquad
          W + E + \\bar u \\bar v = W + \\sum_k p_k u_k v_k

Exact, and the clients go on training factors of rank R. E has rank (N + 1) R at most; with `rank`
only its best approximation is sent, and the error is what was cut off.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; mean u [d_in, R], v [R, d_out];
residual of rank (N + 1) R, or `rank`.

Paper: FedEx-LoRA, Singhal et al. 2024, arXiv:2410.09432.
Source: a copy of the authors' later code (CERT-Lab/fed-sb), for the maths.
Deviates: the residual stays factored; there it is a dense matrix.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora import algebra
from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.federated.fedavg import fedavg
from jlora.merging.exact.concat import concat


class FedEx(NamedTuple):
    """What the server sends."""

    mean: LowRank  # the factors that training goes on from
    residual: LowRank  # to be added to the frozen weight


def fedex(bank: LowRank, weights: Float[Array, "n"], *, rank: int | None = None) -> FedEx:
    """The mean of the factors of one site and its residual.

    Raises ValueError for a rank < 1.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: shares, summing to 1.
      rank: that the residual is cut to, at least 1; None: it is exact, of rank (N + 1) R.

    Returns:
      Mean and residual, both factored.
    """
    mean, exact = fedavg(bank, weights), concat(bank, weights)
    u = jnp.concatenate([exact.u, -mean.u], axis=-1)
    residual = LowRank(u, jnp.concatenate([exact.v, mean.v], axis=-2))
    if rank is not None:
        cut = algebra.truncate({"": residual}, rank).deltas[""]
        residual = algebra.low_rank(cut)
    return FedEx(mean, residual)


SYSTEM = Aggregation(
    name="FedEx-LoRA",
    paper="Singhal 2024, 2410.09432",
    symbol="fedex",
    claim="fedex",
    evidence="mean and residual are exact; tail of a cut residual; mutation check",
    aggregate=lambda bank, weights: Round(*fedex(bank, weights)),
    exact=True,
)
