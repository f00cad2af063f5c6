"""Karcher mean of adapters: the point of the sphere with least squared angles to all of them.

=======  ======================================================
Δ_n      delta of adapter n as one vector, through its core
α_n      |w_n| divided by their sum; the sign of a weight is first given to Δ_n
m        the mean direction
=======  ======================================================

.. math::
    m = \\arg\\min_{|m| = 1} \\sum_n \\alpha_n \\angle(m, \\Delta_n)^2, \\qquad
    m \\leftarrow \\exp_m \\sum_n \\alpha_n \\log_m \\frac{\\Delta_n}{|\\Delta_n|}, \\qquad
    \\Delta = m \\sum_n \\alpha_n |\\Delta_n|

The iteration starts from the direction of the weighted mean of unit vectors and has a fixed number
of `steps`. The mean is a combination of the deltas, hence exact and factored. A zero delta has no
direction and is left out; zero deltas or weights alone give zero.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank N R.
Raises ValueError for steps < 1.

Paper: Karcher 1977; Goddard et al. 2024, arXiv:2403.13257 (mergekit).
Source: mergekit's formulas.
Deviates: deltas are the vectors, no base is added; a fixed number of steps instead of a tolerance.
"""

from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat
from jlora.merging.exact.slerp import mean_direction
from jlora.merging.signs import absorbed


def karcher(bank: LowRank, weights: Float[Array, "n"], *, steps: int = 10) -> LowRank:
    """The spherical mean of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; only their ratios matter, and whether all are 0.
      steps: of the iteration, at least 1; 10, as in mergekit.

    Returns:
      u [d_in, N R], v [N R, d_out]; not finite where the directions cancel.

    Raises:
      ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    bank, weights = absorbed(bank, weights)
    return concat(bank, mean_direction(bank, weights, steps))


SYSTEM = Merging(
    name="karcher",
    paper="Goddard 2024, 2403.13257 (mergekit)",
    symbol="karcher",
    claim="karcher",
    function=karcher,
    evidence="stationarity of the mean; law suite",
)
