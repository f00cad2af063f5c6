"""Model stock: the weighted sum, shrunk towards the base by how much the deltas disagree.

=======  =====================================================================
D_n      delta of adapter n, u_n v_n
c        mean cosine of all pairs of deltas, of the site or of each output; those of weight
         0 are left out
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
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat
from jlora.merging.signs import present


def model_stock(bank: LowRank, weights: Float[Array, "n"], *, outputs: bool = False) -> LowRank:
    """Model stock on one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; the ratio is that of the adapters as they are, whatever the signs.
      outputs: one ratio per output (mergekit's `filter_wise`), not one per site; False.

    Returns:
      u [d_in, N R], v [N R, d_out].
    """
    u, v = concat(bank, weights)
    return LowRank(u, v * ratio(bank, present(weights), outputs=outputs)[None])


def ratio(bank: LowRank, there: Float[Array, "n"] | None = None, *, outputs: bool = False) -> Array:
    """The interpolation ratio t between the base and the sum.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      there: 1 for the adapters that count, else 0; None: all count.
      outputs: one ratio per output instead of one per site; False, as in the paper.

    Returns:
      [1], or [d_out] with `outputs`.
    """
    if bank.u.shape[0] == 1:
        return jnp.ones((1,), bank.u.dtype)
    there = jnp.ones(bank.u.shape[0], bank.u.dtype) if there is None else there
    n = jnp.maximum(jnp.sum(there), 1.0).astype(bank.u.dtype)
    high = lax.Precision.HIGHEST
    left = jnp.einsum("nir,mis->nmrs", bank.u, bank.u, precision=high)
    if outputs:
        gram = jnp.einsum("nro,nmrs,mso->nmo", bank.v, left, bank.v, precision=high)
    else:
        gram = jnp.einsum("nro,nmrs,mso->nm", bank.v, left, bank.v, precision=high)[..., None]
    square = jnp.einsum("nno->no", gram)
    size = jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square)))
    cosine = jnp.clip(gram / (size[:, None] * size[None]), -1.0, 1.0)
    cosine = cosine * (there[:, None] * there[None]).astype(cosine.dtype)[..., None]
    total = jnp.sum(cosine, axis=(0, 1)) - jnp.einsum("nno->o", cosine)
    pairs = jnp.where(n > 1, total / jnp.maximum(n * (n - 1), 1.0), 1.0)
    below = 1.0 + (n - 1) * pairs
    fine = jnp.abs(below) >= 1e-6
    return jnp.where(fine, n * pairs / jnp.where(fine, below, jnp.ones_like(below)), 0.0)


SYSTEM = Merging(
    name="model_stock",
    paper="Jang 2024, 2403.19522",
    symbol="model_stock",
    claim="model_stock",
    function=model_stock,
    breaks={
        "signs": "the ratio is that of the adapters as they were trained",
    },
    evidence="dense numpy value, limits, the paper's claim in small; law suite",
)
