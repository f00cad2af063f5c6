"""Negative weights: the sign of a weight is the sign of its adapter.

=====  ==================================
D_n    delta of adapter n, u_n v_n
w_n    its weight, of any sign
=====  ==================================

.. math:: \\mathrm{merge}(D, w) = \\mathrm{merge}(\\mathrm{sgn}(w) D, |w|)

This is what "subtract a task" means for merges that are no sums: votes, means on a sphere, closed
forms of losses. A weight of -1 gives minus the adapter, what divides by weights divides by sums of
|w_n|, and an adapter of weight 0 is not there.

Source: textbook.
Deviates: nothing.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank


def absorbed(bank: LowRank, weights: Float[Array, "n"]) -> tuple[LowRank, Array]:
    """The bank with the signs of its weights, and their magnitudes.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N].

    Returns:
      (bank, |weights|); the derivative of |w| at 0 is taken for 1, that of a positive weight.
    """
    sign = jnp.where(weights < 0, -jnp.ones_like(weights), jnp.ones_like(weights))
    return LowRank(bank.u * sign.astype(bank.u.dtype)[:, None, None], bank.v), weights * sign


def present(weights: Float[Array, "n"]) -> Array:
    """Which adapters have a weight that is not 0; not differentiated.

    Args:
      weights: of any sign.

    Returns:
      [N], 1 or 0.
    """
    return (weights != 0).astype(weights.dtype)


def without_absent(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The bank with zero deltas in the place of adapters whose weight is 0.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.

    Returns:
      u [N, d_in, R], v [N, R, d_out].
    """
    return LowRank(bank.u * present(weights).astype(bank.u.dtype)[:, None, None], bank.v)
