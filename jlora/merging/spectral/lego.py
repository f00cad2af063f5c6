"""LoRA-LEGO: adapters are taken apart into rank-one units, which are clustered and reassembled.

==========  =====================================================================
m_k         unit k of the pool: column k of u and row k of v, [d_in + d_out]
w_k         weight of its adapter
K           clusters that have units, at most the rank of the result
C_j         the units of cluster j
r           mean number of units of an adapter
==========  =====================================================================

.. math:: \\mu_j = \\frac{\\sum_{k \\in C_j} |w_k| m_k}{\\sum_{k \\in C_j} |w_k|}, \\qquad
          \\mu_j \\leftarrow \\mu_j \\,
          \\frac{\\mathrm{mean}_{k \\in C_j} \\|m_k\\|}{\\|\\mu_j\\|}, \\qquad
          \\Delta = \\sqrt{r / K} \\, \\sum_j c_j \\, \\mu_j^{u} \\, \\mu_j^{v}

Clusters are those of k-means on [a/|a|, b/|b|]; c_j is the mean of N w_k over the cluster, 1 for
equal weights that sum to 1; the mean of |m_k| is weighted with |w_k| too. The dual reweighting is
the factor on each centroid and the one on the output. When K is the size of the pool every unit is
its own cluster and the result is sum_n N w_n Delta_n: the sum of the paper, where fewer clusters
take means.

Units depend on the basis that an adapter is written in: `units="spectral"` takes those of the
singular value decomposition, with the largest entry of each column positive.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, K], v [K, d_out].

Paper: Zhao et al. 2024, arXiv:2409.16167.
Source: abstract; notes and third-party code for the reweighting (its norm is not confirmed).
Deviates: farthest-point start instead of a random one, so the order of adapters does not matter;
weights (the paper has none); an empty cluster adds nothing; padding (zero units) is not clustered.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import algebra
from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat
from jlora.merging.signs import present
from jlora.numerics import einsum


def lego(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    rank: int | None = None,
    steps: int = 10,
    units: str = "factors",
    reweight: bool = True,
    norm: str = "l2",
) -> LowRank:
    """The merge of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], of any sign; 0 leaves an adapter's units out.
      rank: K, clusters, 1 to the size N R of the pool; None: R, as in the paper.
      steps: of k-means, at least 0; 10.
      units: "factors", as the paper's, or "spectral", which no gauge changes.
      reweight: the paper's two rescalings; True.
      norm: of a unit in them, "l2" or "max"; "l2".

    Returns:
      u [d_in, K], v [K, d_out].

    Raises:
      ValueError: rank or steps out of range, other `units` or another `norm`.
    """
    n, d_in, r = bank.u.shape
    if (rank is not None and not 1 <= rank <= n * r) or steps < 0:
        raise ValueError(
            f"rank, steps: got {rank}, {steps}, expected 1 to {n * r} (the pool) and at least 0"
        )
    if units not in ("factors", "spectral") or norm not in ("l2", "max"):
        raise ValueError(f"units, norm: got {units!r}, {norm!r}, expected factors or spectral, "
                         "l2 or max")  # fmt: skip
    if units == "spectral":
        bank = spectral(bank)
        r = bank.u.shape[-1]
    there = present(weights)
    number = jnp.maximum(jnp.sum(there), 1.0)  # adapters that are not of weight 0
    if rank is not None and rank >= n * r:
        return concat(bank, weights * number)
    a, b = bank.u.mT.reshape(n * r, d_in), bank.v.reshape(n * r, -1)
    w = jnp.repeat(weights, r)
    live = (jnp.any(a != 0, axis=1) & jnp.any(b != 0, axis=1)).astype(a.dtype)
    live = live * jnp.repeat(there, r)
    k = min(r if rank is None else rank, n * r)
    own = clusters(a, b, live, k, steps)
    pool, size = jnp.concatenate([a, b], axis=1), jnp.abs(w)[:, None]
    mass = einsum("kj,kq->jq", own, size)
    centre = einsum("kj,kd->jd", own * size, pool) / _safe(mass)
    count = jnp.sum(own, axis=0)[:, None]
    if reweight:
        length = einsum("kj,kq->jq", own * size, _length(pool, norm)) / _safe(mass)
        centre = centre * length / _safe(_length(centre, norm))
    gain = einsum("kj,kq->jq", own, number * w[:, None]) / _safe(count)
    if reweight:
        used = jnp.sum((count > 0).astype(a.dtype))
        gain = gain * jnp.sqrt(jnp.sum(live) / _safe(number * used))
    return LowRank(centre[:, :d_in].T, (centre * gain)[:, d_in:])


def lego_spectral(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    rank: int | None = None,
    steps: int = 10,
    reweight: bool = True,
    norm: str = "l2",
) -> LowRank:
    """`lego` on the units of the SVD.

    Args, Returns and Raises are those of `lego`.
    """
    return lego(
        bank, weights, rank=rank, steps=steps, units="spectral", reweight=reweight, norm=norm
    )


def clusters(
    a: Float[Array, "p d_in"],
    b: Float[Array, "p d_out"],
    live: Float[Array, "p"],
    k: int,
    steps: int,
) -> Array:
    """k-means on rank-one units.

    Not differentiated. Starts from the longest unit, then always the one farthest from all chosen.
    Singular vectors of one adapter are all equally far: ties (up to 1e-4) go to the longer unit and
    to the centre chosen first, so that rounding decides nothing.

    Args:
      a: inputs of the units.
      b: outputs of the units.
      live: 1 for units that count, else 0.
      k: K, clusters.
      steps: of k-means.

    Returns:
      Memberships [P, K], 0 or 1; none of a unit that does not count.
    """
    a, b, live = map(lax.stop_gradient, (a, b, live))
    size = jnp.sum(a * a, axis=1) * jnp.sum(b * b, axis=1)
    size = size / _safe(jnp.max(size))  # at most 1
    x = jnp.concatenate([t / _safe(_length(t, "l2")) for t in (a, b)], axis=1)
    gram, p = (
        einsum("kd,ld->kl", x, x),
        x.shape[0],
    )  # centres are weighted units: nothing else needed
    order = 1e-4 * jnp.arange(k, dtype=x.dtype)[None, :] / k

    def distances(c: Array) -> Array:  # of units to centres c [K, P], squared, [P, K]
        mixed = einsum("jk,kl->jl", c, gram)
        own = jnp.sum(mixed * c, axis=1)
        return jnp.diagonal(gram)[:, None] - 2 * mixed.T + own[None, :]

    def choose(nearest: Array, _: None) -> tuple[Array, Array]:
        tied = nearest >= jnp.max(nearest) - 1e-4
        one = jax.nn.one_hot(jnp.argmax(jnp.where(tied, size, -1.0)), p, dtype=x.dtype)
        nearest = jnp.minimum(nearest, distances(one[None])[:, 0])
        return jnp.where(one > 0, -1.0, nearest), one

    first = jnp.where(live > 0, 8.0 + size, -1.0)  # 8 is the largest squared distance
    _, centres = lax.scan(choose, first, None, length=k)

    def assign(c: Array) -> Array:
        far = distances(c) + order
        return jax.nn.one_hot(jnp.argmin(far, axis=1), k, dtype=x.dtype) * live[:, None]

    def lloyd(c: Array, _: None) -> tuple[Array, None]:
        own = assign(c).T
        count = jnp.sum(own, axis=1, keepdims=True)
        return jnp.where(count > 0, own / _safe(count), c), None

    return assign(lax.scan(lloyd, centres, None, length=steps)[0])


def spectral(bank: LowRank) -> LowRank:
    """The bank in the basis of its singular vectors, balanced, signs fixed.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].

    Returns:
      The same deltas.
    """
    u, s, v = algebra.svd({"": bank})[""]
    least = jnp.finfo(s.dtype).eps * max(u.shape[-2], v.shape[-1]) * s[:, :1]
    root = jnp.where(s > least, jnp.sqrt(s), jnp.zeros_like(s))[:, None, :]  # padding stays zero
    top = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=1, keepdims=True), axis=1)
    sign = jnp.where(top < 0, -1.0, 1.0).astype(u.dtype)
    return LowRank(u * sign * root, (sign * root).mT * v)


def _length(x: Array, norm: str) -> Array:
    """[P, d] -> [P, 1]; a finite gradient (0) at a zero row."""
    if norm == "max":
        return jnp.max(jnp.abs(x), axis=1, keepdims=True)
    squared = jnp.sum(x * x, axis=1, keepdims=True)
    live = squared > 0
    return jnp.where(live, jnp.sqrt(jnp.where(live, squared, jnp.ones_like(squared))), 0.0)


def _safe(x: Array) -> Array:
    return jnp.where(x > 0, x, jnp.ones_like(x))


SYSTEMS = (
    Merging(
        name="lego",
        paper="Zhao 2024, 2409.16167",
        symbol="lego",
        claim="lego",
        function=lego,
        capped=False,
        breaks={
            "gauge": "units are columns of the factors as they are written",
            "signs": "units are clustered as they are: minus one is not the mirror image of it",
        },
        evidence="loops by numpy; shuffled copies are one adapter; K = pool is the sum",
        rows=(48,),
    ),
    Merging(
        name="lego_spectral",
        paper="Zhao 2024, 2409.16167",
        symbol="lego_spectral",
        claim="lego_spectral",
        function=lego_spectral,
        capped=False,
        breaks={
            "gradient": "singular vectors of equal (padded: zero) singular values",
            "difference": "singular vectors of equal (padded: zero) singular values",
            "signs": "units are clustered as they are: minus one is not the mirror image of it",
        },
        evidence="as lego, on units without gauge",
        rows=(48,),
    ),
)
