"""Weighted sum of adapters by concatenation of their factors: exact, of rank N R.

=======  ==================================================
u_n, v_n factors of adapter n, [d_in, R], [R, d_out]
w_n      its weight
=======  ==================================================

.. math:: \\Delta = \\sum_n w_n u_n v_n = [w_1 u_1, w_2 u_2, ...] \\, [v_1; v_2; ...]

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, N R], v [N R, d_out].

Paper: LoRA soups (CAT), Prabhakar et al. 2024, arXiv:2410.13025; FLoRA's stacking is the same map.
Source: textbook.
Deviates: nothing.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging


def concat(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The exact weighted sum of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.

    Returns:
      u [d_in, N R], v [N R, d_out].
    """
    n, d_in, r = bank.u.shape
    u = bank.u * weights[:, None, None]
    return LowRank(jnp.moveaxis(u, 0, 1).reshape(d_in, n * r), bank.v.reshape(n * r, -1))


def concat_error(bank: LowRank, weights: Float[Array, "n"]) -> Array:
    """The certificate of `concat`: it is exact.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: not used.

    Returns:
      Zero, [].
    """
    return jnp.zeros((), bank.u.dtype)


SYSTEM = Merging(
    name="concat",
    paper="Prabhakar 2024, 2410.13025; Wang 2024, 2409.05976",
    symbol="concat",
    claim="concat",
    function=concat,
    certificate=concat_error,
    tight=True,
    evidence="numpy value; law suite",
)
