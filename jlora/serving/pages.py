r"""Pages: one pool of memory for adapters of any rank and for keys and values of tokens.

=====  ====================================================================================
W      numbers of a page: keys and values of one token at all layers
P      pages of the pool; page 0 is all zeros and never given away
m      pages of one component of a rank, :math:`\lceil N / W \rceil` with N numbers per
       component (`jlora.serving.components`)
=====  ====================================================================================

.. math::
    \text{adapter of rank } r: r\,m \text{ pages}, \qquad
    \text{request of } t \text{ tokens}: t \text{ pages}

Any free page will do for anything, so nothing is lost to fragments. The table below says who has
which page; it lives on the host and is a value: every function returns another one. An adapter
that no running request uses stays until its pages are wanted; then the one whose last use is
longest ago goes first. Pinned adapters stay.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA), unified paging.
Deviates: a page holds all layers of a token and is filled with components of all sites, one after
    the other; in the paper every layer has a pool with pages of the width of a hidden vector, and
    projections are square.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Full(ValueError):
    """There are too few pages, even without every adapter that may go."""


class Resident(NamedTuple):
    """An adapter that is in the pool."""

    pages: Int[np.ndarray, "n"]  # in the order of its components
    used: int  # `Table.clock` of its last use
    pins: int  # running requests that use it


class Table(NamedTuple):
    """Who has which page."""

    free: Bool[np.ndarray, "P"]  # never page 0
    held: Mapping[str, Resident]  # adapters by name
    clock: int = 0  # uses so far
    hits: int = 0  # uses of an adapter that was there
    misses: int = 0  # adapters that were put in
    evictions: int = 0  # adapters that went to make room


def empty_table(pages: int) -> Table:
    """A table of free pages.

    Args:
      pages: P, page 0 included.

    Returns:
      The table.

    Raises:
      ValueError: fewer than 2 pages.
    """
    if pages < 2:
        raise ValueError(f"pages: got {pages}, expected at least 2")
    return Table(np.arange(pages) > 0, {})


def count_free(table: Table) -> int:
    """How many pages nobody has.

    Args:
      table: as it is.

    Returns:
      Their number.
    """
    return int(table.free.sum())


def count_evictable(table: Table, keep: frozenset[str] = frozenset()) -> int:
    """How many pages belong to adapters that may go.

    Args:
      table: as it is.
      keep: adapters that stay although nobody has pinned them; none.

    Returns:
      Their number.
    """
    return sum(len(r.pages) for n, r in table.held.items() if not r.pins and n not in keep)


def allocate(table: Table, count: int) -> tuple[Table, Int[np.ndarray, "count"]]:
    """Takes pages, and where too few are free, those of adapters that are not pinned.

    Args:
      table: as it is.
      count: of the pages wanted.

    Returns:
      Another table, and the numbers of the pages.

    Raises:
      ValueError: a negative count.
      Full: too few pages; nothing is evicted then.
    """
    if count < 0:
        raise ValueError(f"pages: got {count}, expected at least 0")
    most = count_free(table) + count_evictable(table)
    if count > most:
        raise Full(f"pages: got {most} that are free or may be freed, expected {count}")
    while count_free(table) < count:
        oldest = min((n for n, r in table.held.items() if not r.pins), key=_used(table))
        table = drop(table, oldest)._replace(evictions=table.evictions + 1)
    pages = np.flatnonzero(table.free)[:count]
    free = table.free.copy()
    free[pages] = False
    return table._replace(free=free), pages.astype(np.int32)


def _used(table: Table):
    return lambda name: table.held[name].used


def release(table: Table, pages: Int[np.ndarray, "n"]) -> Table:
    """Gives pages back.

    Args:
      table: as it is.
      pages: their numbers.

    Returns:
      Another table.

    Raises:
      ValueError: a page that is free already, that does not exist, or page 0.
    """
    pages = np.asarray(pages)
    inside = (pages > 0) & (pages < len(table.free))
    if not inside.all() or table.free[pages].any() or len({*pages.tolist()}) != len(pages):
        raise ValueError(f"pages: got {pages.tolist()}, expected different ones that are in use")
    free = table.free.copy()
    free[pages] = True
    return table._replace(free=free)


def put(table: Table, name: str, count: int) -> tuple[Table, Int[np.ndarray, "count"]]:
    """Makes room for an adapter, which nobody has pinned yet.

    Args:
      table: as it is.
      name: of the adapter.
      count: of its pages.

    Returns:
      Another table, and the pages that its components are to be written to.

    Raises:
      ValueError: it is there already.
      Full: it does not fit.
    """
    if name in table.held:
        raise ValueError(f"{name}: already loaded; unload it first")
    table, pages = allocate(table, count)
    held = {**table.held, name: Resident(pages, table.clock, 0)}
    return table._replace(held=held, misses=table.misses + 1), pages


def drop(table: Table, name: str) -> Table:
    """Takes an adapter out.

    Args:
      table: as it is.
      name: of the adapter.

    Returns:
      Another table, in which its pages are free.

    Raises:
      KeyError: it is not there.
      ValueError: it is pinned.
    """
    resident = _resident(table, name)
    if resident.pins:
        raise ValueError(f"{name}: got {resident.pins} running requests, expected none")
    table = release(table, resident.pages)
    return table._replace(held={k: r for k, r in table.held.items() if k != name})


def pin(table: Table, name: str) -> Table:
    """Keeps an adapter in the pool while a request runs; counts as a use.

    Args:
      table: as it is.
      name: of the adapter.

    Returns:
      Another table.

    Raises:
      KeyError: it is not there.
    """
    old = _resident(table, name)
    new = old._replace(pins=old.pins + 1, used=table.clock + 1)
    return table._replace(held={**table.held, name: new}, clock=table.clock + 1)


def unpin(table: Table, name: str) -> Table:
    """Undoes one `pin`.

    Args:
      table: as it is.
      name: of the adapter.

    Returns:
      Another table.

    Raises:
      KeyError: it is not there.
      ValueError: nobody has pinned it.
    """
    old = _resident(table, name)
    if not old.pins:
        raise ValueError(f"{name}: got no pin, expected at least one")
    return table._replace(held={**table.held, name: old._replace(pins=old.pins - 1)})


def _resident(table: Table, name: str) -> Resident:
    if name not in table.held:
        raise KeyError(f"{name}: not loaded; there are {sorted(table.held)[:20]}")
    return table.held[name]


def bucket(count: int, least: int = 1) -> int:
    """The size that arrays for so many things have: a power of 2, so that few programs compile.

    Args:
      count: of the things.
      least: the smallest size.

    Returns:
      The first of least, 2 least, 4 least, ... that is not below the count.
    """
    size = least
    while size < count:
        size *= 2
    return size


def padded(pages: Int[np.ndarray, "n"], size: int, value: int = 0) -> Int[np.ndarray, "size"]:
    """Numbers of pages in an array of a bucket's size.

    Args:
      pages: their numbers.
      size: of the array.
      value: of the rest: 0 reads zeros; P or more is written nowhere.

    Returns:
      int32.
    """
    out = np.full(size, value, np.int32)
    out[: len(pages)] = pages
    return out


def write(
    data: Float[Array, "P W"], pages: Int[Array, "n"], rows: Float[Array, "n W"]
) -> Float[Array, "P W"]:
    """The pool with some pages written; numbers of P and more are left out.

    Args:
      data: the pool.
      pages: which.
      rows: their new content, cast to the dtype of the pool.

    Returns:
      Another pool; under `jax.jit` with `donate_argnums=0` the same memory.
    """
    return data.at[pages].set(rows.astype(data.dtype), mode="drop")


def empty_pool(pages: int, width: int, dtype: str = "float32") -> Float[Array, "P W"]:
    """A pool of zeros.

    Args:
      pages: P, page 0 included.
      width: W.
      dtype: of the pool.

    Returns:
      The array.
    """
    return jnp.zeros((pages, width), jax.dtypes.canonicalize_dtype(dtype))
