"""Task arithmetic: adding and subtracting deltas; a negative weight forgets a task.

=======  =====================================
D_n      delta of adapter n, u_n v_n
w_n      its weight, of any sign
scale    lambda, of the result
=======  =====================================

.. math:: \\Delta = \\lambda \\sum_n w_n D_n = [\\lambda w_1 u_1, ...] \\, [v_1; ...]

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, N R], v [N R, d_out].

Paper: Ilharco et al. 2022, arXiv:2212.04089.
Source: paper.
Deviates: nothing; it is linear, so it is exact on factors and nothing is streamed.
"""

from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.election import shared
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat, concat_error


def task_arithmetic(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    normalize: bool = False,
    scale: Float[Array, ""] | float = 1.0,
) -> LowRank:
    """The scaled weighted sum of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      normalize: divide by sum |w_n|; False: a sum, as in the paper.
      scale: lambda, a factor of the result; 1.

    Returns:
      u [d_in, N R], v [N R, d_out].
    """
    return concat(bank, shared(weights, normalize) * scale)


SYSTEM = Merging(
    name="task_arithmetic",
    paper="Ilharco 2022, 2212.04089",
    symbol="task_arithmetic",
    claim="task_arithmetic",
    function=task_arithmetic,
    certificate=concat_error,
    tight=True,
    evidence="numpy value; negation and analogy; law suite",
)
