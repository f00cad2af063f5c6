"""Averages of factors (FedIT): the plain aggregation, which is not the average of the deltas.

========  =====================================================
u_k, v_k  factors of client k, [d_in, R], [R, d_out]
p_k       its share, of examples for instance; sums to 1
========  =====================================================

.. math:: \\bar u = \\sum_k p_k u_k, \\quad \\bar v = \\sum_k p_k v_k, \\quad
          \\bar u \\bar v \\ne \\sum_k p_k u_k v_k

It is the baseline that FedEx-LoRA, FLoRA, LoRA-FAIR and FFA-LoRA mend. The result depends on the
basis that each client happens to write its factors in.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, R], v [R, d_out].

Paper: FedIT, Zhang et al. 2023, arXiv:2305.05644; FedAvg, McMahan et al. 2017, arXiv:1602.05629.
Source: the papers that mend it.
Deviates: nothing.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Shaped

from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round


def fedavg(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The mean of the factors of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: shares, summing to 1.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    return LowRank(*(weighted(weights, t) for t in bank))


def shares(counts: Shaped[Array, "n"]) -> Array:
    """The clients' shares, n_k / sum n.

    Args:
      counts: numbers of examples; a count of 0 is absent.

    Returns:
      [N] float32.
    """
    counts = jnp.asarray(counts).astype(jnp.float32)
    return counts / jnp.sum(counts)


def weighted(weights: Float[Array, "n"], x: Float[Array, "n ..."]) -> Array:
    """The weighted sum over the leading axis.

    Args:
      weights: of any sign.
      x: what is summed.

    Returns:
      [...].
    """
    return jnp.einsum("n,n...->...", weights.astype(x.dtype), x, precision=lax.Precision.HIGHEST)


SYSTEM = Aggregation(
    name="FedIT, the average of factors",
    paper="Zhang 2023, 2305.05644",
    symbol="fedavg",
    claim="fedit",
    evidence="numpy value; how far it is from the average of the deltas",
    aggregate=lambda bank, weights: Round(fedavg(bank, weights)),
)
