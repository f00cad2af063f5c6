"""Karcher mean of adapters: the point of the sphere with least squared angles to all of them.

=======  ======================================================
Δ_n      delta of adapter n as one vector, through its core
α_n      weights divided by their sum
m        the mean direction
=======  ======================================================

.. math::
    m = \\arg\\min_{|m| = 1} \\sum_n \\alpha_n \\angle(m, \\Delta_n)^2, \\qquad
    m \\leftarrow \\exp_m \\sum_n \\alpha_n \\log_m \\frac{\\Delta_n}{|\\Delta_n|}, \\qquad
    \\Delta = m \\sum_n \\alpha_n |\\Delta_n|

The iteration starts from the direction of the weighted mean of unit vectors and has a fixed number
of `steps`. The mean is a combination of the deltas, hence exact and factored.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank N R.
Raises ValueError for steps < 1.

Paper: Karcher 1977; Goddard et al. 2024, arXiv:2403.13257 (mergekit).
Source: mergekit's formulas.
Deviates: deltas are the vectors, no base is added; a fixed number of steps instead of a tolerance.
"""

from jax import Array

from jlora.algebra import LowRank
from jlora.merging.exact.concat import concat
from jlora.merging.exact.slerp import mean_direction


def karcher(bank: LowRank, weights: Array, *, steps: int = 10) -> LowRank:
    """The spherical mean of one site."""
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    return concat(bank, mean_direction(bank, weights, steps))
