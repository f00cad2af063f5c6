"""Factored deltas, their sums and their inner products. Never forms dW.

A delta is what an adapter adds to a kernel [d_in, d_out]. Two closed forms are kept factored:
`LowRank` (u @ v; LoRA and all its kin, LoHa through its Khatri-Rao factors) and `Kron` (LoKr).
With delta_k = u_k v_k,

.. math::
    \\langle u_1 v_1, u_2 v_2 \\rangle_F = \\sum_{rs} (u_1^T u_2)_{rs} (v_1 v_2^T)_{rs}, \\qquad
    \\sum_k c_k u_k v_k = [c_1 u_1, c_2 u_2, ...] [v_1; v_2; ...].

Source: textbook linear algebra.
Deviates: nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jlora.core.site import at_least_float32
from jlora.numerics import einsum
from jlora.types import Dynamic, Tree


class LowRank(NamedTuple):
    """The matrix u @ v."""

    u: Array  # [*stack, d_in, R], all scales folded in
    v: Array  # [*stack, R, d_out]


class Kron(NamedTuple):
    """The Kronecker product a ⊗ (u @ v), [i1 * i2, o1 * o2]."""

    a: Array  # [*stack, i1, o1], all scales folded in
    u: Array  # [*stack, i2, R]
    v: Array  # [*stack, R, o2]


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
    by_path: dict[str, list[Delta]] = {}
    for x in xs:
        for path, d in deltas(x).items():
            by_path.setdefault(path, []).append(d)
    return {k: v[0] if len(v) == 1 else _concat(v) for k, v in by_path.items()}


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
    return total([_inner(x[k], y[k]) for k in x if k in y], widest(x, y))


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
        def step(so_far: Array, pair: tuple[Delta, Delta]) -> tuple[Array, None]:
            return so_far + jax.vmap(jax.vmap(_inner, (None, 0)), (0, None))(*pair), None

        flat = jax.tree.map(lambda t: jnp.moveaxis(_flat(t), 1, 0), (x, y))
        none = jnp.zeros((x[0].shape[0], y[0].shape[0]), widest(x, y))
        return lax.scan(step, none, flat)[0]

    sizes = [next(iter(t.values()))[0].shape[0] for t in (x, y)]
    return sum((site(x[k], y[k]) for k in x if k in y), jnp.zeros(sizes, widest(x, y)))


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


# --- small helpers ------------------------------------------------------------------------------


def _bank(x: Dynamic) -> Deltas:
    return widened(x) if isinstance(x, Mapping) else jax.vmap(deltas)(x)


def total(parts: list[Float[Array, "..."]], dtype: DTypeLike) -> Array:
    """The sum of all entries of some arrays.

    Args:
      parts: arrays of any shapes; none gives 0.
      dtype: of the sum.

    Returns:
      [].
    """
    return sum(map(jnp.sum, parts), jnp.zeros((), dtype))


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[-2:])  # [N, *stack, p, q] -> [N, S, p, q]


def _wide(x: Array) -> Array:
    return x if x.dtype == at_least_float32(x.dtype) else x.astype(at_least_float32(x.dtype))


def widest(*trees: Tree) -> jnp.dtype:
    """The widest dtype of the arrays of some trees.

    Args:
      *trees: PyTrees of floating arrays.

    Returns:
      The dtype; float32 where there is no array.
    """
    every = [t.dtype for t in jax.tree.leaves(trees)]
    return max(every, key=lambda d: d.itemsize, default=jnp.dtype(jnp.float32))


def _ratio(x: Array, y: Array) -> Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, jnp.ones_like(y)), jnp.zeros_like(x))
