"""CART: the average, plus what is special about each adapter, cut to a low rank.

=======  ==========================================================
C_n      core of adapter n (`core_space`), [p, q]
C̄        sum_n w_n C_n, the centre (w_n sum to 1)
T_k      best approximation of rank k, `rank`
λ        `scale`
w_n      weight; its sign is first given to C_n, and 0 leaves the adapter out
=======  ==========================================================

.. math:: C = \\bar C + \\lambda \\sum_n T_k(C_n - \\bar C)

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank min(p, q). `rank` is 8 %
of min(d_in, d_out), rounded up, where it is None. Raises ValueError for a rank out of range.

Paper: Choi et al. 2024, Revisiting Weight Averaging for Model Merging, arXiv:2412.12153.
Source: paper; the official code as read through core-space-merging.
Deviates: the centre takes weights, the other parts are those of all adapters of weight not 0. λ is
1 here; the paper tunes it.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.engine.spectral_functions import dot, spectral
from jlora.merging.signs import absorbed, present
from jlora.merging.spectral.core_space import from_core, to_core


def cart(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    rank: int | None = None,
    scale: Float[Array, ""] | float = 1.0,
) -> LowRank:
    """The centre and the low-rank parts around it, of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign, the |w_n| summing to 1.
      rank: of each part around the centre, 1 to min(d_in, d_out); None: 8 % of that, rounded up, as
        in the paper.
      scale: lambda, of the parts around the centre; 1.

    Returns:
      u [d_in, k], v [k, d_out], k = min(p, q).

    Raises:
      ValueError: a rank out of range.
    """
    full = min(bank.u.shape[1], bank.v.shape[2])
    if rank is not None and not 1 <= rank <= full:
        raise ValueError(f"rank: got {rank}, expected 1 to {full}")
    bank, weights = absorbed(bank, weights)
    core = to_core(bank)
    k = rank or math.ceil(0.08 * full)
    mean = dot("n,npq->pq", weights, core.cores)
    own = jax.vmap(partial(spectral, partial(_cut, k)))(core.cores - mean[None])
    return from_core(core, mean + scale * dot("n,npq->pq", present(weights), own))


def _cut(k: int, s: Array) -> Array:
    return s * (jnp.arange(s.shape[0]) < k).astype(s.dtype)


SYSTEM = Merging(
    name="cart",
    paper="Choi 2024, 2412.12153",
    symbol="cart",
    claim="cart",
    function=cart,
    options={"rank": 2, "scale": 0.5},
    evidence="numpy value; law suite",
)
