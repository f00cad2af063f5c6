r"""Taps of the forward pass: what the inputs of the sites of a function look like.

=========  =======================================================================
x_t        an input row of a site, [d_in]
w_t        1, or 0 where `mask` leaves the row out
=========  =======================================================================

.. math::
    C = \sum_t w_t x_t x_t^T, \qquad m = \sum_t w_t x_t

`input_moments` sums C and m exactly. `input_svd` keeps only the leading directions of the rows, by
an SVD of what was kept so far and of the new rows: memory r d_in, not d_in^2. Batches are streamed,
one is held at a time. The function runs as `lift` runs it (scanned, sharded, rematerialised, with
adapters of its own), and its weights may be quantised.

Reference: incremental SVD: Levy and Lindenbaum 2000 (without a mean).
Deviates: nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from jlora import numerics
from jlora.core import compat
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.core.site import Arrays, Site, at_least_float32
from jlora.types import Batch, Dynamic, Tree

Mask = Callable[[Batch], Dynamic]  # a batch -> one entry per input row, zero where it is left out
Reported = Mapping[str, Array]


class Moments(NamedTuple):
    """Sums over the input rows of one site."""

    second: Array  # [*stack, d_in, d_in], of x x^T
    first: Array  # [*stack, d_in], of x
    count: Array  # [*stack], of rows


class Leading(NamedTuple):
    """The leading directions of the input rows of one site."""

    vectors: Array  # [*stack, rank, d_in], orthonormal rows, the largest first
    values: Array  # [*stack, rank], singular values of the matrix of all rows
    energy: Array  # [*stack], the sum of all squared singular values, those cut off included
    count: Array  # [*stack], of rows


def input_moments(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    mask: Mask | None = None,
) -> dict[str, Moments]:
    """First and second moments of the inputs of sites, summed over all batches.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters.
      batches: read once.
      sites: of `jl.sites`: matmuls, and convolutions (whose rows are patches).
      mask: batch -> one entry per input row, in the order of the rows; None: all rows count.

    Returns:
      By path, in at least float32.

    Raises:
      ValueError: a lookup table, no data for a site, values that are not finite, a mask of another
        size than the rows.
      DenseWeightError: a site that is used transposed or through a view of its weight.
    """

    def start(site: Site) -> Moments:
        d, dtype = site.d_in, at_least_float32(site.dtype)
        shapes = ((*site.stack, d, d), (*site.stack, d), site.stack)
        return Moments(*(jnp.zeros(shape, dtype) for shape in shapes))

    adapter = tap(sites, MomentTap)
    return _streamed(fn, params, batches, mask, adapter, start, _summed)


def input_svd(
    fn: Callable,
    params: Tree,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    rank: int,
    mask: Mask | None = None,
) -> dict[str, Leading]:
    """The leading singular directions of the inputs of sites, batch by batch.

    What is cut off after a batch is lost: exact where all rows together have no more than `rank`
    directions, else close where the spectrum falls.

    Args:
      fn: (params, *batch) -> anything; a batch that is no tuple is one argument.
      params: the parameters.
      batches: read once.
      sites: as `input_moments`.
      rank: how many directions are kept; of a site with fewer inputs, all.
      mask: as `input_moments`.

    Returns:
      By path, in at least float32; directions that the data do not have are zero.

    Raises:
      ValueError: as `input_moments`, and a rank below 1.
      DenseWeightError: as `input_moments`.
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")

    def start(site: Site) -> Leading:
        d, k, dtype = site.d_in, min(rank, site.d_in), at_least_float32(site.dtype)
        shapes = ((*site.stack, k, d), (*site.stack, k), site.stack, site.stack)
        return Leading(*(jnp.zeros(shape, dtype) for shape in shapes))

    adapter = tap(sites, lambda path: RowTap(path, rank))
    return _streamed(fn, params, batches, mask, adapter, start, _joined)


@dataclasses.dataclass(frozen=True)
class MomentTap(Method):
    """Reports the sums of x, of x x^T and of 1 at every use."""

    indexed: ClassVar[bool] = True
    path: str = ""

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x @ w, and the sums."""
        rows, count = _rows(self.path, x, ctx)
        first = gram(jnp.ones((*rows.shape[:-1], 1), rows.dtype), rows)[0]
        report = {"second": gram(rows, rows), "first": first, "count": count}
        return x @ w, {"index": ctx["index"], **report}


@dataclasses.dataclass(frozen=True)
class RowTap(Method):
    """Reports the leading directions of the rows of x, times their singular values."""

    indexed: ClassVar[bool] = True
    path: str = ""
    kept: int = 1

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x @ w, and the directions."""
        rows, count = _rows(self.path, x, ctx)
        flat = rows.reshape(-1, rows.shape[-1]).astype(at_least_float32(rows.dtype))
        values, vectors = leading(flat, min(self.kept, flat.shape[1]))
        report = {"rows": values[:, None] * vectors, "energy": jnp.sum(flat * flat), "count": count}
        return x @ w, {"index": ctx["index"], **report}


def tap(sites: Sequence[Site], method: Callable[[str], Method]) -> Adapter:
    """An adapter that changes nothing and has a method that looks at every site.

    Args:
      sites: the sites.
      method: path -> the method of that site.

    Returns:
      An adapter without arrays.
    """
    rows = tuple((dataclasses.replace(s, group=""), method(s.path)) for s in sites)
    return Adapter({s.path: {} for s in sites}, {s.path: {} for s in sites}, rows)


def gram(x: Float[Array, "... n"], y: Float[Array, "... m"]) -> Array:
    """x^T y over all rows, in at least float32; replicated on a mesh with explicit axes.

    Args:
      x: rows.
      y: as many rows.

    Returns:
      [n, m].
    """
    lead = tuple(range(x.ndim - 1))
    options: dict[str, Dynamic] = {}
    if compat.explicit(x):
        options["out_sharding"] = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
    dtype, numbers = at_least_float32(x.dtype), ((lead, lead), ((), ()))
    options |= {"precision": numerics.HIGHEST, "preferred_element_type": dtype}
    return lax.dot_general(x, y.astype(x.dtype), numbers, **options)


def leading(rows: Float[Array, "n d"], rank: int) -> tuple[Array, Array]:
    """The leading singular values and right vectors of a matrix; zeros where there are fewer.

    Args:
      rows: the matrix.
      rank: how many.

    Returns:
      (values [rank], vectors [rank, d]).
    """
    _, values, vectors = numerics.svd(rows)
    missing = max(0, rank - len(values))
    values, vectors = values[:rank], vectors[:rank]
    return jnp.pad(values, (0, missing)), jnp.pad(vectors, ((0, missing), (0, 0)))


def arguments(batch: Batch) -> tuple:
    """The arguments of a function after its parameters.

    Args:
      batch: a tuple of them, or the only one.

    Returns:
      A tuple.
    """
    return batch if isinstance(batch, tuple) else (batch,)


def check_finite(path: str, t: Float[Array, "..."], what: str) -> None:
    """Raises ValueError for values that are not finite.

    Args:
      path: of the site.
      t: the values.
      what: they are.

    Raises:
      ValueError: there are such values.
    """
    if not bool(jnp.all(jnp.isfinite(t))):
        raise ValueError(f"{path}: got {what} that are not finite")


def hashable(fn: Callable) -> Callable:
    """A function that a jitted one can take as a static argument.

    Args:
      fn: any; what is compiled for it is shared by calls with the same object.

    Returns:
      Itself, or one that calls it.
    """
    try:
        hash(fn)
    except TypeError:
        return lambda *args, **kwargs: fn(*args, **kwargs)
    return fn


def _streamed(fn, params, batches, mask, adapter, start, add) -> Dynamic:
    """The state of every site after all batches; `add` takes in what one use of it reports."""
    sites = [site for site, _ in adapter.sites]
    for site in sites:
        if "gather" in site.ops:
            raise ValueError(f"{site.path}: got a lookup table, expected a matmul")
    fn, state = hashable(fn), {site.path: start(site) for site in sites}
    for batch in batches:
        rows = None if mask is None else jnp.asarray(mask(batch))
        state = _step(fn, add, state, params, adapter, arguments(batch), rows)
    for path, moments in state.items():
        if not bool(jnp.all(moments.count > 0)):
            raise ValueError(f"{path}: got no data: no input row, count {moments.count}")
        for t in moments:
            check_finite(path, t, "inputs")
    return state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(fn, add, state, params, adapter, args, rows):
    """The state with one more batch."""
    ctx, stacks = (
        {} if rows is None else {"rows": rows},
        {s.path: s.stack for s, _ in adapter.sites},
    )
    _, reports = lift(fn, aux=True)(params, adapter, *args, ctx=ctx)
    for name, report in reports.items():  # the second use of a site is called path#2
        path, reported = name.split("#")[0], dict(report)
        state = {**state, path: add(state[path], reported.pop("index"), reported, stacks[path])}
    return state


def _summed(state: Moments, index: Array, reported: Reported, stack: tuple[int, ...]) -> Moments:
    """Moments with those of one use, of one slice of the stack or of several."""

    def one(total, part):
        flat = total.reshape(math.prod(stack), *total.shape[len(stack) :])
        part = part.reshape(index.size, *flat.shape[1:]).astype(flat.dtype)
        return flat.at[index.reshape(-1)].add(part).reshape(total.shape)

    return Moments(*(one(t, reported[k]) for k, t in state._asdict().items()))


def _joined(state: Leading, index: Array, reported: Reported, stack: tuple[int, ...]) -> Leading:
    """Leading directions with those of one use, slice after slice."""
    n = math.prod(stack)
    flat = jax.tree.map(lambda t: t.reshape(n, *t.shape[len(stack) :]), state)
    parts = {k: t.reshape(index.size, *t.shape[index.ndim :]) for k, t in reported.items()}

    def one(kept, part):
        at, new = part
        old = jax.tree.map(lambda t: t[at], kept)
        rows = jnp.concatenate([old.values[:, None] * old.vectors, new["rows"]])
        values, vectors = leading(rows, len(old.values))
        new = Leading(vectors, values, old.energy + new["energy"], old.count + new["count"])
        return jax.tree.map(lambda t, v: t.at[at].set(v), kept, new), None

    flat, _ = lax.scan(one, flat, (index.reshape(-1), parts))
    return jax.tree.map(lambda t, whole: t.reshape(whole.shape), flat, state)


def _rows(path: str, x: Dynamic, ctx: Mapping[str, Dynamic]) -> tuple[Array, Array]:
    """(x with zeros in the rows that are left out, how many are not)."""
    x = x.dense() if hasattr(x, "dense") else x
    count = math.prod(x.shape[:-1])
    if "rows" not in ctx:
        return x, jnp.asarray(count, jnp.float32)
    mask = ctx["rows"]
    if mask.size != count:
        raise ValueError(
            f"{path}: mask: got shape {mask.shape}, expected one entry per row, {x.shape[:-1]}"
        )
    mask = mask.astype(bool)
    kept = jnp.where(mask.reshape(*x.shape[:-1], 1), x, jnp.zeros((), x.dtype))
    return kept, jnp.sum(mask).astype(jnp.float32)
