"""Model stock: the weighted sum, shrunk towards the base by how much the deltas disagree.

=======  =====================================================================
D_n      delta of adapter n, u_n v_n
c        mean cosine of all pairs of deltas, of the site or of each output
t        interpolation ratio between the base (0) and the sum (1)
=======  =====================================================================

.. math::
    c = \\frac{2}{N (N - 1)} \\sum_{n < m} \\cos(D_n, D_m), \\qquad
    t = \\frac{N c}{1 + (N - 1) c}, \\qquad \\Delta = t \\sum_n w_n D_n

Inner products come from factors, so the result is exact, of rank N R, and nothing is streamed:
<D_n, D_m> is the sum over (u_n^T u_m) * (v_n v_m^T); of output j it is v_nj^T (u_n^T u_m) v_mj.
t is 0 where 1 + (N - 1) c vanishes, and 1 for a single adapter.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, N R], v [N R, d_out].

Paper: Jang, Yun and Han 2024, arXiv:2403.19522.
Source: paper; all pairs for N > 2, and `outputs` (its `filter_wise`), as in mergekit (formula
only).
Deviates: weights are kept (the paper's are 1/N).
"""

import jax.numpy as jnp
from jax import Array, lax

from jlora.algebra import LowRank
from jlora.merging.exact.concat import concat


def model_stock(bank: LowRank, weights: Array, *, outputs: bool = False) -> LowRank:
    """Model stock on one site; with `outputs`, one ratio for each output."""
    u, v = concat(bank, weights)
    return LowRank(u, v * ratio(bank, outputs=outputs)[None])


def ratio(bank: LowRank, *, outputs: bool = False) -> Array:
    """t as [1], or [d_out]."""
    n = bank.u.shape[0]
    if n == 1:
        return jnp.ones((1,), bank.u.dtype)
    high = lax.Precision.HIGHEST
    left = jnp.einsum("nir,mis->nmrs", bank.u, bank.u, precision=high)
    if outputs:
        gram = jnp.einsum("nro,nmrs,mso->nmo", bank.v, left, bank.v, precision=high)
    else:
        gram = jnp.einsum("nro,nmrs,mso->nm", bank.v, left, bank.v, precision=high)[..., None]
    square = jnp.einsum("nno->no", gram)
    size = jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square)))
    cosine = jnp.clip(gram / (size[:, None] * size[None]), -1.0, 1.0)
    pairs = (jnp.sum(cosine, axis=(0, 1)) - jnp.einsum("nno->o", cosine)) / (n * (n - 1))
    below = 1.0 + (n - 1) * pairs
    fine = jnp.abs(below) >= 1e-6
    return jnp.where(fine, n * pairs / jnp.where(fine, below, jnp.ones_like(below)), 0.0)
