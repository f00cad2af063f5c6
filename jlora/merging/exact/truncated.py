"""Weighted sum of adapters cut to any rank: the best approximation, with its exact error.

=========  ==========================================================
C          core of the weighted sum, sum_n w_n C_n = X S Y^T, [p, q]
L, T       common orthonormal bases (`core_space`)
k          `rank`
=========  ==========================================================

.. math::
    \\Delta = L X_{:k} S_{:k} Y_{:k}^T T, \\qquad
    \\Big\\| \\sum_n w_n u_n v_n - \\Delta \\Big\\|_F = \\Big( \\sum_{i > k} s_i^2 \\Big)^{1/2}

`keep`, which may be traced, keeps fewer than `rank` directions at the same shape: a merge can be
vmapped over ranks. The factors are balanced. PEFT's `svd` merge is this, by way of a dense SVD.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result [d_in, k], [k, d_out] with
k = min(rank, N R, d_in, d_out). Raises ValueError for a rank out of range.

Paper: Eckart and Young 1936.
Source: textbook.
Deviates: nothing.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.engine.spectral_functions import dot, top_basis
from jlora.merging.spectral.core_space import to_core
from jlora.types import Dynamic


def truncated(
    bank: LowRank, weights: Float[Array, "n"], *, rank: int, keep: Dynamic = None
) -> LowRank:
    """The weighted sum cut to a rank.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign.
      rank: of the result, 1 to min(d_in, d_out); N R directions exist.
      keep: [], of these directions the first that are kept, may be traced; None: all.

    Returns:
      u [d_in, k], v [k, d_out], k = min(rank, N R, d_in, d_out). A direction whose singular value
      is 0 is zero in u and not in v, so that it can be trained; those after `keep` are zero.

    Raises:
      ValueError: a rank out of range.
    """
    full = min(bank.u.shape[1], bank.v.shape[2])
    if not 1 <= rank <= full:
        raise ValueError(f"rank: got {rank}, expected 1 to {full}")
    core = to_core(bank)
    c = dot("n,npq->pq", weights, core.cores)
    k = min(rank, *c.shape)
    y, s = top_basis(k, False, c, k if keep is None else keep)
    root = lax.stop_gradient(jnp.sqrt(s))
    root = jnp.where(root > 0, root, jnp.ones_like(root))
    u = dot("ip,pq,kq,k->ik", core.left, c, y, 1 / root)
    return LowRank(u, dot("k,kq,qo->ko", root, y, core.right))


def truncation_error(
    bank: LowRank, weights: Float[Array, "n"], *, rank: int, keep: Dynamic = None
) -> Array:
    """The Frobenius norm of what `truncated` cuts off; exact.

    Args are those of `truncated`.

    Returns:
      [].
    """
    core = to_core(bank)
    s = numerics.svd(dot("n,npq->pq", weights, core.cores), compute_uv=False)
    kept = rank if keep is None else jnp.minimum(keep, rank)
    return jnp.sqrt(jnp.sum(jnp.where(jnp.arange(s.shape[0]) < kept, 0.0, s) ** 2))


SYSTEM = Merging(
    name="truncated",
    paper="Eckart 1936 (textbook)",
    symbol="truncated",
    claim="truncated",
    function=truncated,
    options={"rank": 4},
    certificate=truncation_error,
    tight=True,
    evidence="exact error against dense SVD; vmapped over weights and rank",
)
