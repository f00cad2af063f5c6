r"""A pool of adapters that serves mixed batches while adapters come and go.

=====  ==================================================================================
C      adapters that fit; the pool's arrays have C + 1 slots, the first is the base's
s(n)   slot of the adapter called n
=====  ==================================================================================

.. math:: y_{row} = f(\mathrm{merge}(W, p_{s(n(row))}), x_{row})

The shapes are those of the largest adapter, so that loading, unloading and any mix of rows run the
programs that are there: nothing is compiled anew. A slot that is given back holds the adapter that
changes nothing, and so does the part of a slot that a smaller rank leaves free.

A pool is a value: `load` and `unload` return another one, and batches that run on the old one are
not disturbed.

Paper: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA: many adapters over one base).
Source: paper, for what a pool has to do.
Deviates: slots of one size instead of pages; loading copies the pool's arrays once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.contracts.server import Answers, Server
from jlora.core.adapter import Adapter, stack
from jlora.core.bank import one_adapter
from jlora.core.lift import lift
from jlora.serving.bank import ServingBank, serving_bank
from jlora.types import Dynamic, Tree


@dataclasses.dataclass(frozen=True)
class Pool:
    """Adapters over one base. Not a PyTree: names live on the host."""

    model: Callable[[Dynamic, Dynamic], Dynamic]  # (params, x) -> output, of one row
    params: Tree  # weights of the base
    empty: Adapter  # changes nothing; has the largest rank
    served: ServingBank  # C + 1 adapters in serving order; adapter 0 is `empty`
    slots: Mapping[str, int]  # name -> slot, 1..C

    @property
    def free(self) -> int:
        """How many adapters still fit."""
        return self.served.count - 1 - len(self.slots)


def start(
    model: Callable[[Dynamic, Dynamic], Dynamic], params: Tree, empty: Adapter, capacity: int
) -> Pool:
    """A pool without adapters.

    Args:
      model: (params, x) -> output, of one row.
      params: weights of the base.
      empty: an adapter that changes nothing, as of `jl.init`, with the largest rank to be served.
      capacity: C.

    Returns:
      A pool; its first batch compiles the program.

    Raises:
      ValueError: capacity below 1, or a bank in the place of one adapter.
    """
    if capacity < 1:
        raise ValueError(f"capacity: got {capacity}, expected at least 1")
    one_adapter(empty, "start")
    bank = jax.tree.map(lambda t: jnp.broadcast_to(t, (capacity + 1, *t.shape)), empty)
    return Pool(model, params, empty, serving_bank(bank), {})


def load(pool: Pool, name: str, adapter: Adapter) -> Pool:
    """A pool with one more adapter.

    Args:
      pool: as it is.
      name: what rows call the adapter.
      adapter: of the sites and methods of the pool; its rank may be smaller.

    Returns:
      Another pool.

    Raises:
      ValueError: a name that is taken, no free slot, other sites or methods, a larger rank, or
        arrays that are not finite.
    """
    if name in pool.slots:
        raise ValueError(f"{name}: already loaded; unload it first")
    if not pool.free:
        raise ValueError(f"{name}: got a full pool of {len(pool.slots)} adapters, unload one first")
    one_adapter(adapter, name)
    try:
        pair = stack([pool.empty, adapter])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for (site, got), (_, most) in zip(pair.sites, pool.empty.sites, strict=True):
        if got != most:
            raise ValueError(f"{name}: {site.path}: got {got}, expected at most {most}")
    if not all(np.isfinite(np.asarray(t, "f4")).all() for t in jax.tree.leaves(adapter)):
        raise ValueError(f"{name}: got an array that is not finite")
    slot = min(set(range(1, pool.served.count)) - set(pool.slots.values()))
    served = _write(pool.served, serving_bank(pair[1:]), jnp.int32(slot))
    return dataclasses.replace(pool, served=served, slots={**pool.slots, name: slot})


def unload(pool: Pool, name: str) -> Pool:
    """A pool without one of its adapters, whose slot is free again.

    Args:
      pool: as it is.
      name: of the adapter.

    Returns:
      Another pool.

    Raises:
      KeyError: there is none of that name.
    """
    if name not in pool.slots:
        raise KeyError(f"{name}: not loaded; there are {sorted(pool.slots)}")
    nothing = serving_bank(jax.tree.map(lambda t: t[None], pool.empty))
    served = _write(pool.served, nothing, jnp.int32(pool.slots[name]))
    return dataclasses.replace(
        pool, served=served, slots={k: s for k, s in pool.slots.items() if k != name}
    )


def run(pool: Pool, names: Sequence[str | None], xs: Dynamic) -> Answers:
    """The answers of a batch in which every row has its own adapter.

    Args:
      pool: the adapters.
      names: the adapter of each row; None: the base.
      xs: inputs, a PyTree of arrays with a leading axis of rows.

    Returns:
      Outputs with a leading axis of rows, and an error for each row whose adapter is not loaded;
      the outputs of such rows are NaN (integers: the base's). Another number of rows compiles
      another program.

    Raises:
      ValueError: another number of names than rows.
    """
    sizes = {t.shape[0] for t in jax.tree.leaves(xs)}
    if sizes != {len(names)}:
        raise ValueError(f"names: got {len(names)}, expected one per row of {sorted(sizes)}")
    known = np.asarray([n is None or n in pool.slots for n in names])
    slots = np.asarray([pool.slots.get(n, 0) if n is not None else 0 for n in names], "i4")
    at = jnp.asarray(slots), jnp.asarray(known)
    outputs = _answer(pool.model, pool.served, pool.params, *at, xs)
    loaded = sorted(pool.slots)
    errors = {
        row: KeyError(f"{names[row]}: not loaded; there are {loaded}")
        for row in np.flatnonzero(~known).tolist()
    }
    return Answers(outputs, errors)


@functools.partial(jax.jit, static_argnums=0)
def _answer(
    model: Dynamic, served: ServingBank, params: Tree, slots: Array, known: Array, xs: Dynamic
) -> Dynamic:
    """The outputs of all rows; NaN where the adapter of a row is not known."""
    tuned = lift(model)

    def one(slot: Array, known: Array, x: Dynamic) -> Dynamic:
        return jax.tree.map(lambda y: _or_nan(known, y), tuned(params, served[slot], x))

    return jax.vmap(one)(slots, known, xs)


def _or_nan(known: Array, y: Array) -> Array:
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return y
    return jnp.where(known, y, jnp.asarray(jnp.nan, y.dtype))


@jax.jit
def _write(served: ServingBank, one: ServingBank, slot: Array) -> ServingBank:
    """`served` with the only adapter of `one` in a slot."""

    def put(into: Array, t: Array) -> Array:
        if into.shape == t.shape:  # the index, which every row sets anew
            return into
        axis = next(k for k, (a, b) in enumerate(zip(into.shape, t.shape, strict=True)) if a != b)
        return jax.lax.dynamic_update_slice_in_dim(into, t, slot, axis)

    return dataclasses.replace(served, bank=jax.tree.map(put, served.bank, one.bank))


SYSTEM = Server(
    name="Adapter pool",
    paper="Sheng 2023, 2311.03285 (S-LoRA)",
    symbol="Pool",
    evidence="rows against merged weights while adapters come and go; nothing is compiled anew",
    kind="component",
    rows=(83,),
    start=start,
    load=load,
    unload=unload,
    run=run,
)
