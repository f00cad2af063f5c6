r"""Adapters of mixed ranks in one pool of pages, for any model of rows.

=====  ====================================================================================
R      the largest rank that may be loaded
C      adapters that may be loaded, :math:`C R m` pages in all
T      components of the adapters that a batch uses, up to the size of a bucket
=====  ====================================================================================

.. math:: y_{row} = f(\mathrm{merge}(W, p_{n(row)}), x_{row})

A batch reads the components of its own adapters from their pages (`jlora.serving.pages`) and runs
all rows with them at once, each row with all (`jlora.serving.components`) or with its own
(`jlora.serving.diagonal`), whichever counts less (`jlora.serving.mix`). Its program depends on T
and on that form alone: loading, unloading and other mixes of rows compile nothing while T stays in
its bucket. For a decoder whose
cache lies in the same pages see `jlora.serving.engine`.

A pool is a value: `load` and `unload` return another one, and batches that run on the old one are
not disturbed.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA).
Deviates: loading copies the pool's array once, which the engine does not.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.contracts.server import Answers, Server
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lift import lift
from jlora.core.method import rank_of
from jlora.core.site import Site
from jlora.serving import components, mix, pages
from jlora.types import Dynamic, Tree

WIDTH = 64  # of a page, where no cache shares the pool


@dataclasses.dataclass(frozen=True)
class PagedPool:
    """Adapters over one base. Not a PyTree: names live on the host."""

    model: Callable[[Dynamic, Dynamic], Dynamic]  # (params, x) -> output, of one row
    params: Tree  # weights of the base
    sites: tuple[Site, ...]  # that adapters may have
    ranks: Mapping[str, int]  # path -> the largest rank
    capacity: int  # C
    table: pages.Table  # who has which page
    data: Float[Array, "P W"]  # the pages


def start(
    model: Callable[[Dynamic, Dynamic], Dynamic], params: Tree, empty: Adapter, capacity: int
) -> PagedPool:
    """A pool without adapters.

    Args:
      model: (params, x) -> output, of one row.
      params: weights of the base.
      empty: an adapter with the sites and the largest ranks to be served.
      capacity: C.

    Returns:
      A pool; its first batch compiles the program.

    Raises:
      ValueError: capacity below 1, or a bank in the place of one adapter.
    """
    if capacity < 1:
        raise ValueError(f"capacity: got {capacity}, expected at least 1")
    one_adapter(empty, "start")
    sites = tuple(s for s, _ in empty.sites)
    ranks = {s.path: rank_of(m) for s, m in empty.sites}
    count = 1 + capacity * max(ranks.values()) * pages_of_component(sites, WIDTH)
    table, data = pages.empty_table(count), pages.empty_pool(count, WIDTH)
    return PagedPool(model, params, sites, ranks, capacity, table, data)


def pages_of_component(sites: Sequence[Site], width: int) -> int:
    """m.

    Args:
      sites: that adapters may have.
      width: W.

    Returns:
      Pages of one component of a rank.
    """
    return -(-components.size(sites) // width)


def load(pool: PagedPool, name: str, adapter: Adapter) -> PagedPool:
    """A pool with one more adapter.

    Args:
      pool: as it is.
      name: what rows call the adapter.
      adapter: of the sites of the pool, each of its largest rank or less.

    Returns:
      Another pool.

    Raises:
      ValueError: a name that is taken, C adapters already, other sites, a larger rank, a delta that
        is no product, or arrays that are not finite.
    """
    if name in pool.table.held:
        raise ValueError(f"{name}: already loaded; unload it first")
    if len(pool.table.held) >= pool.capacity:
        raise ValueError(f"{name}: got a full pool of {pool.capacity} adapters, unload one first")
    for site, method in adapter.sites:
        if rank_of(method) > pool.ranks.get(site.path, rank_of(method)):
            most = pool.ranks[site.path]
            raise ValueError(f"{name}: {site.path}: got {method}, expected rank {most} at most")
    try:
        flat = components.components(adapter, pool.sites)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    rows = in_pages(flat, WIDTH)
    table, own = pages.put(pool.table, name, len(rows))
    size = pages.bucket(len(rows), mix.LEAST)
    where = pages.padded(own, size, len(table.free))
    rows = np.pad(rows, ((0, size - len(rows)), (0, 0)))
    return dataclasses.replace(
        pool, table=table, data=_write(pool.data, jnp.asarray(where), jnp.asarray(rows))
    )


_write = jax.jit(pages.write)


def in_pages(flat: Float[np.ndarray, "r N"], width: int) -> Float[np.ndarray, "n W"]:
    """Components as the content of pages.

    Args:
      flat: the components.
      width: W.

    Returns:
      m pages per component, the last one filled up with zeros.
    """
    count = -(-flat.shape[1] // width)
    return np.pad(flat, ((0, 0), (0, count * width - flat.shape[1]))).reshape(-1, width)


def unload(pool: PagedPool, name: str) -> PagedPool:
    """A pool without one of its adapters, whose pages are free again.

    Args:
      pool: as it is.
      name: of the adapter.

    Returns:
      Another pool.

    Raises:
      KeyError: there is none of that name.
    """
    return dataclasses.replace(pool, table=pages.drop(pool.table, name))


def in_use(
    table: pages.Table, names: Sequence[str], per: int, own: bool = False, least: int = mix.LEAST
) -> tuple[Int[np.ndarray, "T m"], Int[np.ndarray, "T"]]:
    """Where the components of some adapters lie, and whose they are.

    Args:
      table: that holds the adapters.
      names: of the adapters; adapter n is the n-th. A name that comes twice has two copies.
      per: m.
      own: whether every adapter fills whole blocks, with components of zeros.
      least: the smallest T.

    Returns:
      Pages per component, and the owner of each; the rest up to a bucket's size is nobody's.
    """
    held = [table.held[name].pages.reshape(-1, per) for name in names]
    if own:
        held = [np.pad(h, ((0, mix.blocks(len(h)) - len(h)), (0, 0))) for h in held]
    count = sum(map(len, held))
    where = np.zeros((mix.size(count, least), per), np.int32)
    owner = np.full(len(where), components.NOBODY, np.int32)
    if held:
        where[:count] = np.concatenate(held)
        owner[:count] = np.repeat(np.arange(len(held)), [len(h) for h in held])
    return where, owner


def run(pool: PagedPool, names: Sequence[str | None], xs: Dynamic) -> Answers:
    """The answers of a batch in which every row has its own adapter.

    Args:
      pool: the adapters.
      names: the adapter of each row; None: the base.
      xs: inputs, a PyTree of arrays with a leading axis of rows.

    Returns:
      Outputs with a leading axis of rows, and an error for each row whose adapter is not loaded;
      the outputs of such rows are NaN (integers: the base's).

    Raises:
      ValueError: another number of names than rows.
    """
    sizes = {t.shape[0] for t in jax.tree.leaves(xs)}
    if sizes != {len(names)}:
        raise ValueError(f"names: got {len(names)}, expected one per row of {sorted(sizes)}")
    per = pages_of_component(pool.sites, WIDTH)
    known = np.asarray([n is None or n in pool.table.held for n in names])
    there = [n if k else None for n, k in zip(names, known, strict=True)]
    plan = mix.plan(there, ranks_of(pool.table, per))
    where, owner = in_use(pool.table, plan.names, per, plan.own)
    arrays = (jnp.asarray(t) for t in (where, owner, plan.numbers, known))
    outputs = _answer(pool.model, pool.sites, plan.own, pool.params, pool.data, *arrays, xs)
    loaded = sorted(pool.table.held)
    errors = {
        row: KeyError(f"{names[row]}: not loaded; there are {loaded}")
        for row in np.flatnonzero(~known).tolist()
    }
    return Answers(outputs, errors)


def ranks_of(table: pages.Table, per: int) -> dict[str, int]:
    """How many components every adapter in the pool has.

    Args:
      table: that holds them.
      per: m.

    Returns:
      By name.
    """
    return {name: len(held.pages) // per for name, held in table.held.items()}


def gather(
    data: Float[Array, "P W"],
    where: Int[Array, "T m"],
    owner: Int[Array, "T"],
    sites: tuple[Site, ...],
    own: bool = False,
    dtype: str | None = None,
) -> Adapter:
    """The components of a batch out of their pages.

    Args:
      data: the pages.
      where: of each component, of `in_use`.
      owner: of each component.
      sites: that adapters may have.
      own: whether every component is of one row (`components.bank`).
      dtype: of the numbers; None: that of the pages.

    Returns:
      An adapter of `components.bank`.
    """
    flat = data[where].reshape(len(where), -1)[:, : components.size(sites)]
    flat = flat if dtype is None else flat.astype(dtype)
    return components.bank(flat, sites, owner, own)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(
    model: Dynamic,
    sites: tuple[Site, ...],
    own: bool,
    params: Tree,
    data: Array,
    where: Array,
    owner: Array,
    rows: Array,
    known: Array,
    xs: Dynamic,
) -> Dynamic:
    """The outputs of all rows; NaN where the adapter of a row is not known."""
    tuned, bank = lift(model), gather(data, where, owner, sites, own)

    def one(row: Array, known: Array, x: Dynamic) -> Dynamic:
        outputs = tuned(params, components.for_row(bank, row), x)
        return jax.tree.map(lambda y: _or_nan(known, y), outputs)

    return jax.vmap(one)(rows, known, xs)


def _or_nan(known: Array, y: Array) -> Array:
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return y
    return jnp.where(known, y, jnp.asarray(jnp.nan, y.dtype))


SYSTEM = Server(
    name="S-LoRA",
    paper="Sheng 2023, 2311.03285",
    symbol="PagedPool",
    evidence="rows of mixed ranks and a decoder's logits against merged weights, on one device and "
    "split over eight, where adapters send thin tensors only; pages, eviction, scheduling and the "
    "served protocol",
    rows=(83,),
    tests=(
        "tests/serving/pages_test.py",
        "tests/serving/components_test.py",
        "tests/serving/diagonal_test.py",
        "tests/serving/mix_test.py",
        "tests/serving/schedule_test.py",
        "tests/serving/shelf_test.py",
        "tests/serving/engine_test.py",
        "tests/serving/parallel_test.py",
        "tests/serving/endurance_test.py",
        "tests/serving/server_test.py",
        "tests/cli/serve_test.py",
    ),
    claim="s_lora",
    start=start,
    load=load,
    unload=unload,
    run=run,
)
