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
k = min(rank, N R, d_in, d_out). Raises ValueError for a rank < 1.

Paper: Eckart and Young 1936.
Source: textbook.
Deviates: nothing.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jlora.algebra import LowRank
from jlora.merging.engine.spectral_functions import dot, top_basis
from jlora.merging.spectral.core_space import to_core


def truncated(bank: LowRank, weights: Array, *, rank: int, keep: Any = None) -> LowRank:
    """The weighted sum cut to `rank`; of its directions the first `keep` [] are kept."""
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")
    core = to_core(bank)
    c = dot("n,npq->pq", weights, core.cores)
    k = min(rank, *c.shape)
    y, s = top_basis(k, False, c, k if keep is None else keep)
    root = lax.stop_gradient(jnp.sqrt(s))
    root = jnp.where(root > 0, root, jnp.ones_like(root))
    u = dot("ip,pq,kq,k->ik", core.left, c, y, 1 / root)
    return LowRank(u, dot("k,kq,qo->ko", root, y, core.right))


def truncation_error(bank: LowRank, weights: Array, *, rank: int, keep: Any = None) -> Array:
    """The Frobenius norm of what `truncated` cuts off, []; exact."""
    core = to_core(bank)
    s = jnp.linalg.svd(dot("n,npq->pq", weights, core.cores), compute_uv=False)
    kept = rank if keep is None else jnp.minimum(keep, rank)
    return jnp.sqrt(jnp.sum(jnp.where(jnp.arange(s.shape[0]) < kept, 0.0, s) ** 2))
