"""A merge that acts on the elements of dW, by row blocks, and back to factors. No dense dW.

=========  =====================================================================================
D_n        delta of adapter n, u_n v_n [d_in, d_out]; only b of its rows exist at a time
f          the `rule`: ([N, b, d_out] deltas, [b] row numbers) -> [b, d_out], the same row by row
M          the merged matrix, M[i] = f(D_1[i], ..., D_N[i]); of any rank
Q          orthonormal [d_in, k], the columns of M (M^T M)^q G, G Gaussian [d_out, rank + p]
=========  =====================================================================================

.. math:: M \\approx U V, \\quad U = Q X_r, \\quad V = U^T M, \\quad Q^T M = X S Y^T

A pass computes each block once: q power iterations take 2 q + 2 passes, and one more gives the
error |M - U V|. The largest temporary has N b d_out elements. Where M takes `STORED` bytes at
most, which is what a few blocks take, M itself is kept and its blocks are computed once, unless
`Solver.store` says otherwise: one M at a time, and one for each lane under vmap. Rows beyond d_in
are zero deltas, so rules must map zeros to zero.

Gradients hold for whatever part of M is kept, and take the part that is cut off for zero,

.. math:: d(U V) = U U^T dM + (I - U U^T) \\, dM \\, V^+ V

so they are exact where M has rank r at most: at full rank, and for weighted sums of rank N R.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; factors u [d_in, r] orthonormal, v [r, d_out].

Paper: Halko, Martinsson and Tropp 2011, arXiv:0909.4061 (algorithms 4.4 and 5.1).
Source: paper.
Deviates: blocks of a large M are recomputed for each pass; the error is measured, not estimated.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import numerics
from jlora.algebra import LowRank
from jlora.numerics import matmul
from jlora.types import Dynamic, Tree

Rule = Callable[[Array, Array], Array]  # ([N, b, d_out], [b] int32) -> [b, d_out]
Sparsify = Callable[[Array, Array], Array]  # the same arguments -> [N, b, d_out]
ROWS, ELEMENTS = 32, 2**19  # the most of a default block: rows; elements of all deltas (2 MiB)
STORED = 2**22  # bytes of the largest M that is kept by default: 1024 x 1024 float32, 4 MiB


@dataclasses.dataclass(frozen=True)
class Solver:
    """How the merged matrix is read. Raises ValueError for negative settings."""

    power: int = 2  # power iterations q: 2 q + 2 passes
    oversample: int = 8  # p, columns beyond the rank
    block: int | None = None  # rows at a time; by default 32, or fewer that fill 2 MiB
    store: bool | None = None  # keep M [d_in, d_out], in one pass; None: if of STORED bytes or less

    def __post_init__(self):
        least = {"power": 0, "oversample": 0, "block": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: got {value}, expected at least {low}")

    def stores(self, d_in: int, d_out: int, dtype: Dynamic) -> bool:
        """Whether M itself is kept.

        Args:
          d_in: rows of M.
          d_out: columns of M.
          dtype: of its elements.

        Returns:
          `store`; where that is None, whether M takes `STORED` bytes or less.
        """
        return d_in * d_out * dtype.itemsize <= STORED if self.store is None else self.store


class Factored(NamedTuple):
    """A merged matrix as factors."""

    factors: LowRank  # u [d_in, r] with orthonormal columns, v [r, d_out]
    error: Array  # [], |M - u v|, Frobenius, measured by one more pass
    norm: Array  # [], |M|


def fold(
    bank: LowRank, step: Callable[..., Tree], init: Tree, block: int | None,
    *rows: Float[Array, "d_in ..."],
) -> Dynamic:  # fmt: skip
    """carry = step(carry, deltas, row numbers, blocks of `rows`) over all row blocks of M.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      step: of (carry, deltas [N, b, d_out], row numbers [b], blocks of `rows` [b, ...]).
      init: the carry at first.
      block: b; None: as many rows as fill 2 MiB, at most 32.
      *rows: arrays read along; what lies beyond d_in is zero.

    Returns:
      The last carry.
    """
    u, numbers, *along = _blocked(bank, block, rows)

    @jax.checkpoint  # differentiated, blocks are computed again instead of kept
    def one(carry: Tree, x: Dynamic) -> tuple[Dynamic, None]:
        return step(carry, deltas(x[0], bank.v), x[1], x[2:]), None

    return lax.scan(one, init, (u, numbers, *along))[0]


def rows_of(
    bank: LowRank,
    rule: Rule,
    after: Callable[[Float[Array, "b d_out"]], Float[Array, "b ..."]],
    block: int | None,
) -> Array:
    """A function of each merged block, for all rows.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      rule: of M.
      after: what is computed of a block.
      block: b; None: as in `fold`.

    Returns:
      [d_in, ...].
    """
    u, numbers = _blocked(bank, block, ())

    @jax.checkpoint
    def one(x: Dynamic) -> Array:
        return after(rule(deltas(x[0], bank.v), x[1]))

    out = lax.map(one, (u, numbers))
    return out.reshape(-1, *out.shape[2:])[: bank.u.shape[1]]


def deltas(u: Float[Array, "n b r"], v: Float[Array, "n r d_out"]) -> Array:
    """u_n v_n of all adapters; the same in every pass.

    Args:
      u: left factors.
      v: right factors.

    Returns:
      [N, b, d_out].
    """
    return jnp.einsum("nbr,nro->nbo", u, v, precision=lax.Precision.HIGHEST)


def dense(bank: LowRank, rule: Rule, *, block: int | None = None) -> Array:
    """M itself, in one pass.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      rule: of M.
      block: rows at a time; None: as in `fold`.

    Returns:
      [d_in, d_out].
    """
    return rows_of(bank, rule, lambda m: m, block)


def into(
    bank: LowRank, rule: Rule, base: Float[Array, "d_in d_out"], *, block: int | None = None
) -> Array:
    """base + M, block by block; under jit of a donated base, in its place.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      rule: of M.
      base: what M is added to.
      block: rows at a time; None: as in `fold`.

    Returns:
      [d_in, d_out], in the base's dtype.

    Raises:
      ValueError: a base that is not [d_in, d_out].
    """
    d_in, d_out = bank.u.shape[1], bank.v.shape[-1]
    if base.shape != (d_in, d_out):
        raise ValueError(f"base: got shape {base.shape}, expected {(d_in, d_out)}")
    count, b = _blocks(bank, block)

    @jax.checkpoint
    def part(u: Array, numbers: Array, first: Array) -> Array:
        m = rule(deltas(u, bank.v), numbers)
        return jnp.where((numbers >= first)[:, None], m, jnp.zeros_like(m))

    def step(k: Array, out: Array) -> Array:
        start = jnp.minimum(k * b, d_in - b)  # the last block repeats rows, and adds zero to them
        u, old = (lax.dynamic_slice_in_dim(t, start, b, axis=t.ndim - 2) for t in (bank.u, out))
        m = part(u, start + jnp.arange(b, dtype=jnp.int32), k * b)
        wide = m.dtype if m.dtype.itemsize > old.dtype.itemsize else old.dtype
        new = (old.astype(wide) + m.astype(wide)).astype(old.dtype)
        return lax.dynamic_update_slice_in_dim(out, new, start, axis=0)

    return lax.fori_loop(0, count, step, base)


def factor(
    bank: LowRank, rule: Rule, rank: int | None = None, solver: Solver | None = None
) -> LowRank:
    """M as factors, by a randomised range finder.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      rule: of M.
      rank: of the factors, 1 to min(d_in, d_out); None: N R, at most full.
      solver: how M is read; None: `Solver()`.

    Returns:
      u [d_in, rank] with orthonormal columns, v [rank, d_out].

    Raises:
      ValueError: a rank out of range.
    """
    solver = solver or Solver()
    (n, d_in, r), d_out = bank.u.shape, bank.v.shape[-1]
    full = min(d_in, d_out)
    rank = min(n * r, full) if rank is None else rank
    if not 1 <= rank <= full:
        raise ValueError(f"rank: got {rank}, expected 1 to {full}")
    width = min(rank + solver.oversample, full)
    right, left = _products(bank, rule, solver)
    q = jax.random.normal(jax.random.key(0), (d_out, width), bank.u.dtype)
    for k in range(solver.power + 1 if width < full else 1):
        q = _basis(right(_basis(left(q)) if k else q))
    b = left(q).T  # q.T @ M
    core = numerics.qr(lax.stop_gradient(b).T, mode="r").T  # b = core @ (orthonormal rows)
    x, s, _ = numerics.svd(core)
    u, v = matmul(q, x[:, :rank]), matmul(x[:, :rank].T, b)
    there = s[:rank] > full * jnp.finfo(s.dtype).eps * s[0]
    inverse = jnp.where(there, 1.0 / jnp.where(there, s[:rank], 1.0), 0.0)
    turn = right(lax.stop_gradient(v).T * jnp.square(inverse)[None])  # M V^+, which is u
    return LowRank(u + _slope_of(turn - matmul(u, matmul(u.T, turn))), v)


def certified(
    bank: LowRank, rule: Rule, rank: int | None = None, solver: Solver | None = None
) -> Factored:
    """`factor`, its true error and the norm of M, by one more pass.

    Args and Raises are those of `factor`.

    Returns:
      Factors, |M - u v| and |M|.
    """
    solver = solver or Solver()
    low = factor(bank, rule, rank, solver)
    error, norm = distance(bank, rule, low, block=solver.block)
    return Factored(low, error, norm)


def distance(
    bank: LowRank, rule: Rule, low: LowRank, *, block: int | None = None
) -> tuple[Array, Array]:
    """How far factors are from M.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      rule: of M.
      low: any factors u [d_in, r], v [r, d_out].
      block: rows at a time; None: as in `fold`.

    Returns:
      (|M - u v|, |M|), Frobenius.
    """

    def step(carry: Tree, d: Array, numbers: Array, along: Dynamic) -> Dynamic:
        m = rule(d, numbers)
        gap = m - matmul(along[0], low.v)
        return carry + jnp.stack([jnp.sum(gap * gap), jnp.sum(m * m)])

    total = fold(bank, step, jnp.zeros(2, bank.u.dtype), block, low.u)
    return jnp.sqrt(total[0]), jnp.sqrt(total[1])


def flip(x: LowRank) -> LowRank:
    """The transposed deltas: rows become columns.

    Args:
      x: u [..., d_in, R], v [..., R, d_out].

    Returns:
      u [..., d_out, R], v [..., R, d_in].
    """
    return LowRank(x.v.mT, x.u.mT)


def _products(bank: LowRank, rule: Rule, solver: Solver) -> tuple[Dynamic, Dynamic]:
    """The functions g -> M g and q -> M^T q."""
    if solver.stores(bank.u.shape[1], bank.v.shape[-1], bank.u.dtype):
        m = dense(bank, rule, block=solver.block)
        return lambda g: matmul(m, g), lambda q: matmul(m.T, q)

    def right(g: Array) -> Array:
        return rows_of(bank, rule, lambda m: matmul(m, g), solver.block)

    return right, lambda q: _left(bank, rule, q, solver.block)


@jax.custom_jvp
def _slope_of(x: Array) -> Array:
    """Zero, with the derivative of x; compiled, x is computed for derivatives only."""
    return jnp.zeros_like(x)


_slope_of.defjvp(lambda primals, tangents: (jnp.zeros_like(primals[0]), tangents[0]))


def _basis(y: Array) -> Array:
    return lax.stop_gradient(numerics.qr(y)[0])


def _left(bank: LowRank, rule: Rule, q: Array, block: int | None) -> Array:
    """M^T q [d_out, k]."""

    def step(carry: Array, d: Array, numbers: Array, along: Dynamic) -> Array:
        return carry + matmul(rule(d, numbers).T, along[0])

    shape = (bank.v.shape[-1], q.shape[-1])
    return fold(bank, step, jnp.zeros(shape, bank.u.dtype), block, q)


def _blocks(bank: LowRank, block: int | None) -> tuple[int, int]:
    """(number of blocks, rows of each), as even as can be."""
    n, d_in, _ = bank.u.shape
    count = -(-d_in // (block or max(1, min(ROWS, ELEMENTS // (n * bank.v.shape[-1])))))
    return count, -(-d_in // count)


def _blocked(bank: LowRank, block: int | None, rows: tuple[Array, ...]) -> tuple[Array, ...]:
    """u [blocks, N, b, R], row numbers [blocks, b], rows [blocks, b, ...]; padded with zeros."""
    d_in, (count, b) = bank.u.shape[1], _blocks(bank, block)

    def cut(t: Array) -> Array:
        t = jnp.pad(t, [(0, count * b - d_in)] + [(0, 0)] * (t.ndim - 1))
        return t.reshape(count, b, *t.shape[1:])

    u = cut(jnp.moveaxis(bank.u, 1, 0)).swapaxes(1, 2)
    numbers = jnp.arange(count * b, dtype=jnp.int32).reshape(count, b)
    return u, numbers, *map(cut, rows)
