"""Linear algebra on factored deltas: sums, inner products, spectra, truncation. Never forms dW.

A delta is what an adapter adds to a kernel [d_in, d_out]. Two closed forms are kept factored:
`LowRank` (u @ v; LoRA and all its kin, LoHa through its Khatri-Rao factors) and `Kron` (LoKr).
`deltas(adapter)` reads them off an adapter as `{path: delta}`, stack axes leading; every function
below takes such a dictionary (or the adapter itself), is pure, and can be jitted, vmapped and
differentiated (spectra: away from repeated singular values). A missing site is a zero delta.

With delta_k = u_k v_k, all of it rests on three identities,

.. math::
    \\langle u_1 v_1, u_2 v_2 \\rangle_F = \\sum_{rs} (u_1^T u_2)_{rs} (v_1 v_2^T)_{rs}, \\qquad
    \\sum_k c_k u_k v_k = [c_1 u_1, c_2 u_2, ...] [v_1; v_2; ...],

.. math::
    u = Q_u R_u, \\; v^T = Q_v R_v, \\; R_u R_v^T = X \\Sigma Y^T \\;\\Rightarrow\\;
    u v = (Q_u X) \\Sigma (Q_v Y)^T .

Results are float32 (float64 where the factors are). Matmuls run at the highest precision.

Source: textbook linear algebra (Eckart-Young-Mirsky for truncation; Bjorck and Golub, 1973, for
principal angles); the core SVD is that of Core Space merging (Panariello et al., 2025).
Deviates: nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.core.site import at_least_float32
from jlora.numerics import einsum
from jlora.system import System
from jlora.types import Dynamic

FRESH = 3**-0.5  # norm of a column of LoRA's initial `a`, uniform in +-1/sqrt(d_in)


class LowRank(NamedTuple):
    """The matrix u @ v."""

    u: Array  # [*stack, d_in, R], all scales folded in
    v: Array  # [*stack, R, d_out]


class Kron(NamedTuple):
    """The Kronecker product a ⊗ (u @ v), [i1 * i2, o1 * o2]."""

    a: Array  # [*stack, i1, o1], all scales folded in
    u: Array  # [*stack, i2, R]
    v: Array  # [*stack, R, o2]


class SVD(NamedTuple):
    """Thin singular value decomposition u @ diag(s) @ v, k = min(R, d_in, d_out)."""

    u: Array  # [*stack, d_in, k], orthonormal columns
    s: Array  # [*stack, k], descending
    v: Array  # [*stack, k, d_out], orthonormal rows


class Truncated(NamedTuple):
    """The best approximation of rank k and the certificate of its error."""

    deltas: "Deltas"  # as `balanced` splits them
    errors: dict[str, Array]  # path -> [*stack], Frobenius norm of what was cut off, exact
    total: Array  # scalar, root of the summed squares of all errors


Delta = LowRank | Kron
Deltas = dict[str, Delta]


def deltas(adapter: Dynamic) -> Deltas:
    """The factored deltas of an adapter; of a bank under `jax.vmap`.

    Args:
      adapter: an adapter, or a dictionary of deltas, which is only widened.

    Returns:
      {path: LowRank or Kron}, stack axes leading, at least float32.

    Raises:
      TypeError: a method has neither `kron` nor `factors` (its delta has no closed factored form).
    """
    if isinstance(adapter, Mapping):
        return widened(adapter)
    return {site.path: _read(adapter, site, method) for site, method in adapter.sites}


def widened(x: Mapping[str, Delta]) -> Deltas:
    """Deltas whose factors are float32, or wider where they are; exact.

    Args:
      x: {path: delta}.

    Returns:
      The same in a new dictionary.
    """
    return jax.tree.map(_wide, dict(x))


def _read(adapter: Dynamic, site: Dynamic, method: Dynamic) -> Delta:
    own, shared = adapter.arrays(site)
    for form, read in ((Kron, getattr(method, "kron", None)), (LowRank, method.factors)):

        def one(own: dict[str, Array], read: Dynamic = read) -> Dynamic:
            return read(method.prepare({**shared, **own}))

        for _ in site.stack:
            one = jax.vmap(one)
        parts = None if read is None else one(own)
        if parts is not None:
            return form(*map(_wide, parts))
    name = type(method).__name__
    raise TypeError(f"{site.path}: {name} has no factored delta (no `factors`, no `kron`)")


def low_rank(x: Delta) -> LowRank:
    """Any delta as u @ v; a ⊗ uv = (a ⊗ u)(I ⊗ v) = (I ⊗ u)(a ⊗ v), the one of lower rank.

    Args:
      x: a delta of either form.

    Returns:
      u [*stack, d_in, R], v [*stack, R, d_out].
    """
    if isinstance(x, LowRank):
        return x
    n = min(x.a.shape[-2:])
    eye = jnp.broadcast_to(jnp.eye(n, dtype=x.a.dtype), (*x.a.shape[:-2], n, n))
    if n == x.a.shape[-1]:
        return LowRank(kron(x.a, x.u), kron(eye, x.v))
    return LowRank(kron(eye, x.u), kron(x.a, x.v))


def kron(a: Float[Array, "*s i1 o1"], b: Float[Array, "*s i2 o2"]) -> Array:
    """Kronecker product of the last two axes.

    Args:
      a: left factor.
      b: right factor.

    Returns:
      [*s, i1 i2, o1 o2].
    """
    out = a[..., :, None, :, None] * b[..., None, :, None, :]
    return out.reshape(*a.shape[:-2], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])


# --- linear structure ---------------------------------------------------------------------------


def scale(x: Dynamic, c: Dynamic) -> Deltas:
    """c times the deltas.

    Args:
      x: an adapter or its deltas.
      c: scalar, folded into the left factor.

    Returns:
      {path: delta}.
    """
    return {k: type(d)(d[0] * jnp.asarray(c, d[0].dtype), *d[1:]) for k, d in deltas(x).items()}


def add(*xs: Dynamic) -> Deltas:
    """The exact sum, by concatenation: ranks add up. A Kronecker delta joins as low rank.

    Args:
      *xs: adapters or deltas; a missing site is a zero delta.

    Returns:
      {path: delta}.
    """
    found: dict[str, list[Delta]] = {}
    for x in xs:
        for path, d in deltas(x).items():
            found.setdefault(path, []).append(d)
    return {k: v[0] if len(v) == 1 else _concat(v) for k, v in found.items()}


def combine(bank: Dynamic, weights: Float[Array, "n"]) -> Deltas:
    """The exact weighted sum over a bank, of rank N R.

    Args:
      bank: a bank, or its deltas [N, *stack, ...].
      weights: of any sign.

    Returns:
      {path: LowRank}.
    """

    def one(d: Delta) -> LowRank:
        u, v = low_rank(d)
        u = u * jnp.asarray(weights, u.dtype).reshape(-1, *[1] * (u.ndim - 1))
        u, v = jnp.moveaxis(u, 0, -2), jnp.moveaxis(v, 0, -3)  # [*s, i, N, R], [*s, N, R, o]
        return LowRank(u.reshape(*u.shape[:-2], -1), v.reshape(*v.shape[:-3], -1, v.shape[-1]))

    return {path: one(d) for path, d in _bank(bank).items()}


def _concat(parts: list[Delta]) -> LowRank:
    us, vs = zip(*map(low_rank, parts), strict=True)
    return LowRank(jnp.concatenate(us, axis=-1), jnp.concatenate(vs, axis=-2))


# --- metric structure ---------------------------------------------------------------------------


def inner(x: Dynamic, y: Dynamic) -> Array:
    """The Frobenius inner product, summed over sites and stack axes.

    Args:
      x: an adapter or its deltas.
      y: another one.

    Returns:
      [].
    """
    x, y = deltas(x), deltas(y)
    return _sum([_inner(x[k], y[k]) for k in x if k in y], _dtype(x, y))


def norm(x: Dynamic) -> Array:
    """The Frobenius norm over all sites. Differentiable except at zero.

    Args:
      x: an adapter or its deltas.

    Returns:
      [].
    """
    return jnp.sqrt(inner(x, x))


def cosine(x: Dynamic, y: Dynamic) -> Array:
    """The cosine of two adapters, <x, y> / (|x| |y|).

    Args:
      x: an adapter or its deltas.
      y: another one.

    Returns:
      [], 0 where one of them is zero.
    """
    return _ratio(inner(x, y), norm(x) * norm(y))


def distance(x: Dynamic, y: Dynamic) -> Array:
    """|x - y| over all sites, through the cores: exact to eps |x| even where x is close to y.

    Args:
      x: an adapter or its deltas.
      y: another one.

    Returns:
      [].
    """
    cores = [_core(low_rank(d))[1] for d in add(x, scale(y, -1.0)).values()]
    return jnp.sqrt(_sum([c**2 for c in cores], _dtype(cores)))


def gram(bank: Dynamic, other: Dynamic = None) -> Array:
    """All inner products of a bank, or of two banks: one matmul per site and factor.

    The stack axes are scanned, so the largest temporary has N M R R' elements.

    Args:
      bank: a bank of N, or its deltas.
      other: a bank of M; None: the same bank.

    Returns:
      [N, M].
    """
    x = _bank(bank)
    y = x if other is None else _bank(other)

    def site(x: Delta, y: Delta) -> Array:
        def step(total: Array, pair: tuple[Delta, Delta]) -> tuple[Array, None]:
            return total + jax.vmap(jax.vmap(_inner, (None, 0)), (0, None))(*pair), None

        flat = jax.tree.map(lambda t: jnp.moveaxis(_flat(t), 1, 0), (x, y))
        total = jnp.zeros((x[0].shape[0], y[0].shape[0]), _dtype(x, y))
        return lax.scan(step, total, flat)[0]

    sizes = [next(iter(t.values()))[0].shape[0] for t in (x, y)]
    return sum((site(x[k], y[k]) for k in x if k in y), jnp.zeros(sizes, _dtype(x, y)))


def similarity(bank: Dynamic) -> Array:
    """The cosines of all pairs of a bank.

    Args:
      bank: a bank, or its deltas.

    Returns:
      [N, N]; 0 in the rows of a zero adapter.
    """
    g = gram(bank)
    n = jnp.sqrt(jnp.diagonal(g))
    return _ratio(g, n[:, None] * n[None, :])


def _inner(x: Delta, y: Delta) -> Array:  # [*stack]
    if isinstance(x, Kron) and isinstance(y, Kron) and x.a.shape == y.a.shape:
        return jnp.sum(x.a * y.a, axis=(-2, -1)) * _inner(LowRank(*x[1:]), LowRank(*y[1:]))
    (u1, v1), (u2, v2) = low_rank(x), low_rank(y)
    left, right = (
        einsum("...ir,...is->...rs", u1, u2),
        einsum("...ro,...so->...rs", v1, v2),
    )
    return jnp.sum(left * right, axis=(-2, -1))


# --- spectra ------------------------------------------------------------------------------------


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
    total = jnp.sqrt(_sum([e**2 for e in errors.values()], _dtype(errors)))
    return Truncated(kept, errors, total)


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


# --- small helpers ------------------------------------------------------------------------------


def _bank(x: Dynamic) -> Deltas:
    return widened(x) if isinstance(x, Mapping) else jax.vmap(deltas)(x)


def _sum(parts: list[Array], dtype: jnp.dtype) -> Array:
    return sum(map(jnp.sum, parts), jnp.zeros((), dtype))


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[-2:])  # [N, *stack, p, q] -> [N, S, p, q]


def _wide(x: Array) -> Array:
    return x if x.dtype == at_least_float32(x.dtype) else x.astype(at_least_float32(x.dtype))


def _dtype(*trees: Dynamic) -> jnp.dtype:
    found = [t.dtype for t in jax.tree.leaves(trees)]
    return max(found, key=lambda d: d.itemsize, default=jnp.dtype(jnp.float32))


def _ratio(x: Array, y: Array) -> Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, jnp.ones_like(y)), jnp.zeros_like(x))


SYSTEM = System(
    name="Factored delta algebra",
    paper="Panariello 2025 (core space); textbook",
    symbol="svd",
    evidence="dense numpy oracles; certificate of truncation; cancellation; mutation check",
    kind="component",
)
