"""RobustMerge: factors pruned, their directions rescaled for what was lost, then averaged.

=========  ====================================================================================
A_n, B_n   factors of adapter n, balanced and in a fixed gauge: [d_in, r], [r, d_out]
m          mask of the `density` largest entries of a factor
s_n        [r], for each direction: sum |A_n| / sum |A_n m|, at least its own `floor` quantile
w_n        weights; the sign is first given to the adapter, and 0 leaves it out
=========  ====================================================================================

.. math::
    A = \\sum_n w_n A_n m_n, \\qquad
    B = \\Big( \\sum_n w_n s_n B_n m_n' \\Big) \\Big/ \\sum_n s_n

Small directions lose most by pruning and are enlarged most. A product of sums has cross terms:
this merge is neither exact nor idempotent.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result [d_in, R], [R, d_out].
Raises ValueError for density outside (0, 1] or floor outside [0, 1).

Paper: Zeng et al. 2025, Parameter Efficient Merging for Multimodal LLMs, arXiv:2502.17159.
Source: official code (AuroraZengfh/RobustMerge), where w_n = 2, density = 0.2, floor = 0.8.
Deviates: factors are balanced by their SVD, signs fixed by the largest entry of a column of A, so
that the gauge of an adapter does not matter; the official code takes them raw.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import algebra
from jlora.algebra import LowRank
from jlora.merging.engine.record import HELD, SMALL_ENTRIES, Merging
from jlora.merging.engine.spectral_functions import dot, support
from jlora.merging.signs import absorbed, present
from jlora.merging.spectral.core_space import largest


def robust_merge(
    bank: LowRank, weights: Float[Array, "n"], *, density: float = 0.2, floor: float = 0.8
) -> LowRank:
    """The merge of one site, of the rank of its adapters.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; |w_n| multiplies both factors, as in the official code.
      density: share of the entries of a factor that is kept, in (0, 1]; 0.2.
      floor: quantile of an adapter's s_n that its smaller ones are raised to, in [0, 1); 0.8.

    Returns:
      u [d_in, R], v [R, d_out].

    Raises:
      ValueError: density or floor out of range.
    """
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"floor: got {floor}, expected 0 <= floor < 1")
    bank, weights = absorbed(bank, weights)
    a, b, live = canonical(bank)
    count = jnp.sum(live, axis=1)  # [N], directions that are there
    cut = jax.vmap(lambda x, n: x * largest(x, density, n * x.size / live.shape[1]))
    masked = cut(a, count)
    kept, total = jnp.sum(jnp.abs(masked), axis=1), jnp.sum(jnp.abs(a), axis=1)  # [N, r]
    some = kept > 0
    s = jnp.where(some, total / jnp.where(some, kept, jnp.ones_like(kept)), live)
    rank = live.shape[1] - count + jnp.floor(count * floor)  # absent ones come first, as zeros
    least = jnp.take_along_axis(jnp.sort(s, axis=1), rank.astype(jnp.int32)[:, None], axis=1)
    s = live * jnp.maximum(s, least) * present(weights)[:, None]
    total = jnp.sum(s, axis=0)
    share = s / jnp.where(total > 0, total, jnp.ones_like(total))[None]
    v = jnp.sum((weights[:, None] * share)[..., None] * cut(b, count), axis=0)
    return LowRank(jnp.sum(weights[:, None, None] * masked, axis=0), v)


def canonical(bank: LowRank) -> tuple[Array, Array, Array]:
    """Balanced singular factors of each adapter, signs fixed.

    Gradients hold the singular bases fixed.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].

    Returns:
      a [N, d_in, r], b [N, r, d_out], and live [N, r]: 1 where a singular value is not zero.
    """
    u, s, v = lax.stop_gradient(algebra.svd({"": bank})[""])
    top = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=1, keepdims=True), axis=1)
    live = support(s, max(u.shape[1], v.shape[2]))
    root = jnp.sqrt(jnp.where(live > 0, s, jnp.ones_like(s)))
    u = u * (live * jnp.sign(top[:, 0]) / root)[:, None, :]
    v = v * (live * jnp.sign(top[:, 0]) / root)[:, :, None]
    a, b = dot("nir,nro,nko->nik", *bank, v), dot("nik,nir,nro->nko", u, *bank)
    return a, b, live


SYSTEM = Merging(
    name="robust_merge",
    paper="Zeng 2025, 2502.17159",
    symbol="robust_merge",
    claim="robust_merge",
    function=robust_merge,
    options={"density": 0.5},
    breaks={
        "weight_one": SMALL_ENTRIES,
        "idempotent": "the second factor is averaged: N copies give 1/N of one",
        "difference": HELD,
    },
    evidence="numpy value; law suite",
)
