"""FLoRA: client adapters are stacked, not averaged; the aggregate is exact, for any ranks.

========  =====================================================
u_k, v_k  factors of client k, all scales (alpha / r) folded in
p_k       its share, on one factor only: on both it would be p^2
========  =====================================================

.. math:: \\Delta = [p_1 u_1, ..., p_K u_K] \\, [v_1; ...; v_K] = \\sum_k p_k u_k v_k

The clients add it to their frozen weights (`jlora.merge`) and start the next round with a fresh
adapter, so the rank does not grow over rounds; what is sent down grows with the clients,
R' = sum of their ranks.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, N R], v [N R, d_out].

Paper: Wang et al. 2024, arXiv:2409.05976.
Source: official code (ATP-1010/FederatedLLM), for the maths.
Deviates: scales are folded in before, so clients of different alpha / r stack correctly.
"""

from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.merging.exact.concat import concat


def flora(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The stacked adapter of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: shares, summing to 1.

    Returns:
      u [d_in, N R], v [N R, d_out].
    """
    return concat(bank, weights)


SYSTEM = Aggregation(
    name="FLoRA",
    paper="Wang 2024, 2409.05976",
    symbol="flora",
    claim="flora",
    evidence="exact for clients of other ranks and alpha, on a model; p squared is seen",
    kind="composition",
    rows=(68,),
    aggregate=lambda bank, weights: Round(flora(bank, weights)),
    exact=True,
)
