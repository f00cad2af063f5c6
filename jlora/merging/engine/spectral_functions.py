"""Spectral functions of small matrices, differentiable also where singular values repeat or vanish.

====  =========================================================================================
C     a core [p, q], C = X S Y^T (thin SVD, k = min(p, q))
f     a function of all singular values [k] -> [k]; symmetric in its arguments
====  =========================================================================================

.. math::
    F(C) = X f(S) Y^T, \\qquad
    X^T dF\\, Y = \\frac{f_i - f_j}{s_i - s_j} \\circ \\mathrm{sym}(X^T dC\\, Y) +
                 \\frac{f_i + f_j}{s_i + s_j} \\circ \\mathrm{skew}(X^T dC\\, Y) + df

The divided differences become derivatives where s_i = s_j, so nothing divides by zero; the
derivative of an SVD's factors, which JAX would use, is infinite there.

`basis` and `top_basis` give orthonormal bases of subspaces, with the derivative of the subspace:
a rotation inside it is left out, for what is computed from a subspace does not depend on it.
Where the columns given to `basis` are dependent, a derivative that would enlarge the span is left
out too; gradients with respect to weights are exact, as bases do not depend on them.

Original to jlora; textbook (Daleckii and Krein 1965 for the divided differences).
Deviates: nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.system import System
from jlora.types import Dynamic

dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def support(s: Float[Array, "... k"], size: int) -> Array:
    """Which singular values are not noise; not differentiated.

    Args:
      s: singular values.
      size: rows or columns of the matrix, whichever are more.

    Returns:
      [..., k], 1 or 0.
    """
    tol = 4 * size * jnp.finfo(s.dtype).eps * jnp.max(s, axis=-1, keepdims=True)
    return lax.stop_gradient((s > tol).astype(s.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def spectral(f: Callable[..., Float[Array, "k"]], c: Float[Array, "p q"], *args: Dynamic) -> Array:
    """X f(S, *args) Y^T of a matrix with the SVD X S Y^T.

    Args:
      f: all singular values [k] to [k], symmetric; static.
      c: the matrix.
      *args: further arguments of f; floats may be traced.

    Returns:
      [p, q].
    """
    x, s, y = numerics.svd(c)
    return dot("ik,k,kj->ij", x, f(s, *args), y)


@spectral.defjvp
def _spectral_jvp(f, primals, tangents):
    (c, *args), (dc, *dargs) = primals, tangents
    x, s, y = numerics.svd(c)
    fs, dargs_f = jax.jvp(lambda *a: f(s, *a), tuple(args), tuple(dargs)) if args else (
        f(s),
        jnp.zeros_like(s),
    )  # fmt: skip
    jac = jax.jacfwd(lambda t: f(t, *args))(s)
    slope = jnp.diagonal(jac)[:, None] - jac  # the limit of a divided difference
    slope = (slope + slope.T) / 2
    near = jnp.sqrt(jnp.finfo(s.dtype).eps) * jnp.max(s)
    g_minus = _quotient(fs[:, None] - fs[None, :], s[:, None] - s[None, :], near, slope)
    ratio = _quotient(fs, s, near * 1e-2, jnp.diagonal(jac))
    g_plus = _quotient(fs[:, None] + fs[None, :], s[:, None] + s[None, :], near * 1e-2, slope)
    a = dot("ik,ij,lj->kl", x, dc, y)
    eye = jnp.eye(s.shape[0], dtype=s.dtype)
    inner = (g_minus * (a + a.T) + g_plus * (a - a.T)) / 2
    inner = inner * (1 - eye) + jnp.diag(jac @ jnp.diagonal(a) + dargs_f)
    out = dot("ik,kl,lj->ij", x, inner, y)
    left = dot("ij,lj->il", dc, y) - dot("ik,kl->il", x, a)  # parts outside of the thin bases
    right = dot("ik,ij->kj", x, dc) - dot("kl,lj->kj", a, y)
    out = out + dot("il,l,lj->ij", left, ratio, y) + dot("ik,k,kj->ij", x, ratio, right)
    return dot("ik,k,kj->ij", x, fs, y), out


@jax.custom_jvp
def basis(u: Float[Array, "d n"]) -> Array:
    """Orthonormal columns whose span holds that of u.

    Args:
      u: any columns.

    Returns:
      [d, min(d, n)].
    """
    return numerics.qr(u)[0]


@basis.defjvp
def _basis_jvp(primals, tangents):
    (u,), (du,) = primals, tangents
    q, r = numerics.qr(u)
    if q.shape[0] == q.shape[1]:
        return q, jnp.zeros_like(q)
    x, s, y = numerics.svd(r)
    live = support(s, max(u.shape))
    inverse = live / jnp.where(live > 0, s, jnp.ones_like(s))
    step = dot("dn,kn,k,pk->dp", du, y, inverse, x)  # du R^+
    return q, step - q @ dot("dp,dq->pq", q, step)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def top_basis(rank: int, live: bool, c: Float[Array, "p q"], keep: Dynamic) -> tuple[Array, Array]:
    """The leading right singular vectors of c, and their values.

    The derivative of the vectors is that of the span of what is left.

    Args:
      rank: how many, at most min(p, q).
      live: whether directions whose value is noise become zero.
      c: the matrix.
      keep: [], how many of them are not zero; may be traced.

    Returns:
      (y [rank, q], s [rank]).
    """
    _, s, y = numerics.svd(c)
    kept = _kept(rank, live, c, s, keep)[:rank]
    return y[:rank] * kept[:, None], s[:rank] * kept


@top_basis.defjvp
def _top_basis_jvp(rank, live, primals, tangents):
    (c, keep), dc = primals, tangents[0]
    x, s, y = numerics.svd(c)
    kept = _kept(rank, live, c, s, keep)
    a = dot("ik,ij,lj->kl", x, dc, y)
    near = jnp.sqrt(jnp.finfo(s.dtype).eps) * 1e-2 * jnp.max(s)
    up = s[:, None] * a + s[None, :] * a.T
    gap = (s[:, None] - s[None, :]) * (s[:, None] + s[None, :])
    turn = _quotient(up, gap, near * near, jnp.zeros_like(up)) * (1 - kept[None, :])
    out = dot("ik,ij->kj", x, dc) - dot("kl,lj->kj", a, y)  # outside of the thin basis
    out = _quotient(out, jnp.broadcast_to(s[:, None], out.shape), near, jnp.zeros_like(out))
    step = (dot("kl,lj->kj", turn, y) + out)[:rank] * kept[:rank, None]
    kept = kept[:rank]
    return (y[:rank] * kept[:, None], s[:rank] * kept), (step, jnp.diagonal(a)[:rank] * kept)


def _kept(rank: int, live: bool, c: Array, s: Array, keep: Dynamic) -> Array:
    first = (jnp.arange(s.shape[0]) < jnp.minimum(keep, rank)).astype(s.dtype)
    return first * support(s, max(c.shape)) if live else first


def top_pair(c: Float[Array, "p q"], rank: int) -> tuple[Array, Array, Array, Array]:
    """c cut to a rank as x @ b @ y, in bases of subspaces.

    Columns of x and rows of y are zero where the singular value is. With the derivatives of
    `top_basis`, whatever is the same for (x Q, Q^T b R, R^T y) is differentiated exactly.

    Args:
      c: the matrix.
      rank: k, at most min(p, q).

    Returns:
      (x [p, k], b [k, k], y [k, q], s [k]).
    """
    (x, s), (y, _) = top_basis(rank, True, c.T, rank), top_basis(rank, True, c, rank)
    return x.T, dot("kp,pq,lq->kl", x, c, y), y, s


def polar(m: Float[Array, "p q"]) -> Array:
    """The orthogonal polar factor, zero on what m sends to zero.

    Args:
      m: the matrix.

    Returns:
      [p, q].
    """
    return spectral(_ones, m)


def _ones(s: Array) -> Array:
    return support(s, s.shape[0])


def _quotient(x: Array, y: Array, near: Dynamic, limit: Array) -> Array:
    far = jnp.abs(y) > near
    return jnp.where(far, x / jnp.where(far, y, jnp.ones_like(y)), limit)


SYSTEM = System(
    name="Safe spectral functions",
    paper="Daleckii 1965 (textbook)",
    symbol="spectral",
    evidence="derivatives against differences at repeated and zero singular values",
    kind="component",
)
