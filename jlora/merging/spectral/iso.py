"""Isotropic merging: the sum of all adapters with one singular value for all directions.

=======  ==========================================================================
C_n      core of adapter n (`core_space`), [p, q]; C = sum_n w_n C_n = X S Y^T
s̄        mean of the singular values that are not zero
m        dimensions of each adapter's own space (Iso-CTS)
=======  ==========================================================================

.. math::
    \\text{Iso-C}: \\; \\bar{s} X Y^T, \\qquad
    \\text{Iso-CTS}: \\; \\bar{s}\\; \\mathrm{polar}[X_{:c}, X_1, ..., X_N] \\;
    \\mathrm{polar}[Y_{:c}, Y_1, ..., Y_N]^T

where :math:`X_n, Y_n` are the m leading singular vectors of :math:`(I - X_{:c} X_{:c}^T) w_n C_n`,
c + N m the number of dimensions, c about `common` of them, and s̄ the mean of all values used.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result of rank min(p, q).
Raises ValueError for `common` outside [0, 1].

Paper: Marczak et al. 2025, arXiv:2502.04959.
Source: official code (danielm1405/iso-merging, as in fusion_bench).
Deviates: the number of dimensions is that of the core, min(p, q), and not of the weight: in the
full space a merge of low-rank adapters would become full-rank noise outside of their span.
Directions of value zero count neither in the mean nor in the result. Weights are ours.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.merging.engine.record import FLAT, Merging
from jlora.merging.engine.spectral_functions import dot, polar, spectral, support, top_pair
from jlora.merging.spectral.core_space import from_core, to_core


def iso_c(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The weighted sum with a flat spectrum.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.

    Returns:
      u [d_in, k], v [k, d_out], k = min(p, q).
    """
    core = to_core(bank)
    return from_core(core, spectral(_flat, dot("n,npq->pq", weights, core.cores)))


def iso_cts(bank: LowRank, weights: Float[Array, "n"], *, common: float = 0.8) -> LowRank:
    """The common space of the sum, and the own space of each adapter, with a flat spectrum.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: of any sign.
      common: share of the dimensions that the common space gets, in [0, 1]; 0.8, as in the paper.

    Returns:
      u [d_in, k], v [k, d_out], k = min(p, q).

    Raises:
      ValueError: common out of range.
    """
    if not 0.0 <= common <= 1.0:
        raise ValueError(f"common: got {common}, expected 0 <= common <= 1")
    core = to_core(bank)
    n, p, q = core.cores.shape
    k = min(p, q)
    own = min(round((k - int(k * common)) / n), k // n)
    tasks = core.cores * weights[:, None, None]
    whole = jnp.sum(tasks, axis=0)[None]
    parts = [_directions(whole, k - n * own, whole)]
    if own:
        x = parts[0][0][0]
        parts.append(_directions(tasks - dot("pk,rk,nrq->npq", x, x, tasks), own, tasks))
    x = jnp.concatenate([jnp.moveaxis(x, 0, 1).reshape(p, -1) for x, _, _ in parts], axis=1)
    y = jnp.concatenate([y.reshape(-1, q) for _, y, _ in parts])
    s = jnp.concatenate([s.reshape(-1) for _, _, s in parts])
    return from_core(core, _mean(s) * dot("pk,kq->pq", polar(x), polar(y)))


def _directions(c: Array, rank: int, of: Array) -> tuple[Array, Array, Array]:
    """Paired leading directions of c [N, p, q]: x [N, p, rank], y [N, rank, q], s [N, rank].

    Those that are noise alongside `of` [N, p, q], what c is a part of, are zero.
    """
    if not rank:
        return c[:, :, :0], c[:, :0], c[:, 0, :0]
    x, b, y, s = jax.vmap(lambda t: top_pair(t, rank))(c)
    noise = 4 * max(c.shape[1:]) * jnp.finfo(c.dtype).eps * jnp.linalg.norm(of, axis=(1, 2))
    live = lax.stop_gradient((s > noise[:, None]).astype(s.dtype))
    x = dot("npk,nkl->npl", x, jax.vmap(polar)(b)) * live[:, None, :]
    return x, y * live[:, :, None], s * live


def _mean(s: Array) -> Array:
    live = support(s, s.shape[0])
    return jnp.sum(s * live) / jnp.maximum(jnp.sum(live), jnp.ones((), s.dtype))


def _flat(s: Array) -> Array:
    return support(s, s.shape[0]) * _mean(s)


SYSTEMS = (
    Merging(
        name="iso_c",
        paper="Marczak 2025, 2502.04959",
        symbol="iso_c",
        claim="iso_c",
        function=iso_c,
        breaks={
            "weight_one": FLAT,
            "idempotent": FLAT,
        },
        evidence="numpy value; law suite",
    ),
    Merging(
        name="iso_cts",
        paper="Marczak 2025, 2502.04959",
        symbol="iso_cts",
        claim="iso_cts",
        function=iso_cts,
        breaks={
            "weight_one": FLAT,
            "idempotent": FLAT,
        },
        evidence="numpy value; law suite",
    ),
)
