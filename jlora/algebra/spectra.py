"""Spectra of factored deltas: SVDs, truncation, distances, principal angles. Never forms dW.

All of it goes through the core of a delta, a small matrix that has its singular values:

.. math::
    u = Q_u R_u, \\; v^T = Q_v R_v, \\; R_u R_v^T = X \\Sigma Y^T \\;\\Rightarrow\\;
    u v = (Q_u X) \\Sigma (Q_v Y)^T .

Source: textbook linear algebra (Eckart-Young-Mirsky for truncation; Bjorck and Golub, 1973, for
principal angles); the core SVD is that of Core Space merging (Panariello et al., 2025).
Deviates: nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jlora import numerics
from jlora.algebra.sums import Delta, Deltas, LowRank, add, deltas, low_rank, scale, total, widest
from jlora.numerics import einsum
from jlora.system import System
from jlora.types import Dynamic

FRESH = 3**-0.5  # norm of a column of LoRA's initial `a`, uniform in +-1/sqrt(d_in)


class SVD(NamedTuple):
    """Thin singular value decomposition u @ diag(s) @ v, k = min(R, d_in, d_out)."""

    u: Array  # [*stack, d_in, k], orthonormal columns
    s: Array  # [*stack, k], descending
    v: Array  # [*stack, k, d_out], orthonormal rows


class Truncated(NamedTuple):
    """The best approximation of rank k and the certificate of its error."""

    deltas: Deltas  # as `balanced` splits them
    errors: dict[str, Array]  # path -> [*stack], Frobenius norm of what was cut off, exact
    total: Array  # scalar, root of the summed squares of all errors


def svd(x: Dynamic) -> dict[str, SVD]:
    """The exact SVD of every delta through its core: two thin QRs and one SVD of R x R.

    Args:
      x: an adapter or its deltas.

    Returns:
      {path: SVD}.
    """
    return {path: _svd(d) for path, d in deltas(x).items()}


def singular_values(x: Dynamic) -> dict[str, Array]:
    """The singular values of every delta, from the core alone.

    Args:
      x: an adapter or its deltas.

    Returns:
      {path: [*stack, k]}, descending.
    """
    cores = {path: _core(low_rank(d))[1] for path, d in deltas(x).items()}
    return {path: numerics.svd(core, compute_uv=False) for path, core in cores.items()}


def truncate(x: Dynamic, rank: int) -> Truncated:
    """The best approximation of every delta by a rank, with the exact error.

    Args:
      x: an adapter or its deltas.
      rank: at most, of every delta.

    Returns:
      The deltas and their errors.

    Raises:
      ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    kept, errors = {}, {}
    for path, (u, s, v) in svd(x).items():
        kept[path] = balanced(SVD(u[..., :rank], s[..., :rank], v[..., :rank, :]))
        errors[path] = jnp.sqrt(jnp.sum(s[..., rank:] ** 2, axis=-1))
    squares = total([e**2 for e in errors.values()], widest(errors))
    return Truncated(kept, errors, jnp.sqrt(squares))


def balanced(x: SVD) -> LowRank:
    """u sqrt(s) and sqrt(s) v; what no delta needs is left as LoRA starts: u not zero, v zero.

    Directions whose singular value is rounding noise keep columns of norm `FRESH` in u, so that a
    delta of less rank than its factors can be trained at all of it.

    Args:
      x: u [*stack, d_in, k], s [*stack, k], v [*stack, k, d_out].

    Returns:
      u [*stack, d_in, k], v [*stack, k, d_out].
    """
    noise = 4 * x.s.shape[-1] * jnp.finfo(x.s.dtype).eps * x.s[..., :1]
    live = x.s > noise
    root = jnp.sqrt(jnp.where(live, x.s, jnp.ones_like(x.s)))
    left, right = jnp.where(live, root, FRESH), jnp.where(live, root, jnp.zeros_like(root))
    return LowRank(x.u * left[..., None, :], right[..., :, None] * x.v)


def distance(x: Dynamic, y: Dynamic) -> Array:
    """|x - y| over all sites, through the cores: exact to eps |x| even where x is close to y.

    Args:
      x: an adapter or its deltas.
      y: another one.

    Returns:
      [].
    """
    cores = [_core(low_rank(d))[1] for d in add(x, scale(y, -1.0)).values()]
    return jnp.sqrt(total([c**2 for c in cores], widest(cores)))


def principal_angles(x: Dynamic, y: Dynamic) -> dict[str, tuple[Array, Array]]:
    """Angles between the input spaces and between the output spaces of two adapters.

    Small angles come from sines, large ones from cosines: both are exact.

    Args:
      x: an adapter or its deltas.
      y: another one.

    Returns:
      {path: (in, out)} of the sites of both, in radians, ascending, [*stack, min(k_x, k_y)]; pi/2
      for each dimension the smaller space lacks (zero-padded ranks).
    """
    x, y = svd(x), svd(y)
    out = {}
    for path in x.keys() & y.keys():
        (u1, v1), (u2, v2) = _spaces(x[path]), _spaces(y[path])
        out[path] = (_angles(u1, u2), _angles(v1, v2))
    return dict(sorted(out.items()))


def _core(x: LowRank) -> tuple[Array, Array, Array]:
    (qu, ru), (qv, rv) = numerics.qr(x.u), numerics.qr(x.v.mT)
    return qu, einsum("...ir,...jr->...ij", ru, rv), qv


def _svd(x: Delta) -> SVD:
    qu, core, qv = _core(low_rank(x))
    u, s, v = numerics.svd(core)
    return SVD(
        einsum("...ik,...kr->...ir", qu, u),
        s,
        einsum("...rk,...ok->...ro", v, qv),
    )


def _spaces(x: SVD) -> tuple[Array, Array]:
    tol = jnp.finfo(x.s.dtype).eps * max(x.u.shape[-2], x.v.shape[-1])
    live = (x.s > tol * x.s[..., :1]).astype(x.s.dtype)[..., None, :]  # null directions become 0
    return x.u * live, x.v.mT * live


def _angles(p: Array, q: Array) -> Array:
    if p.shape[-1] < q.shape[-1]:
        p, q = q, p
    y, c, z = numerics.svd(einsum("...ir,...is->...rs", p, q))
    gap = einsum("...is,...ks->...ik", q, z) - einsum("...ir,...rk->...ik", p, y * c[..., None, :])
    sine = jnp.clip(jnp.linalg.norm(gap, axis=-2), 0.0, 1.0)
    return jnp.where(c > 0.7, jnp.arcsin(sine), jnp.arccos(jnp.clip(c, 0.0, 1.0)))


SYSTEM = System(
    name="Factored delta algebra",
    paper="Panariello 2025 (core space); textbook",
    symbol="svd",
    evidence="dense numpy oracles; certificate of truncation; cancellation; mutation check",
    tests=("", "tests/algebra_test.py"),
    kind="component",
)
