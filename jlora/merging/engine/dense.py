"""The merged delta of one site as it is, row block by row block: exact, for merged weights.

=====  ======================================================================
M      the merged matrix of one slice of a site, [d_in, d_out], of any rank
b      `row_block`, rows of M at a time
=====  ======================================================================

.. math:: M_{i:i+b} = f(D_1, ..., D_N)_{i:i+b}

Element-wise merges (TIES, DARE, ...) have no exact factors of a small rank: as an adapter they are
cut, as merged weights they need not be. Whatever a merge reads of all elements (thresholds,
energies) is read once per slice, in passes over small blocks; after that a block costs one product
[N, b, R] [N, R, d_out]. At most N b d_out elements exist at a time, and no dense delta.

DELLA ranks the elements of an output: its blocks are b outputs with all inputs instead.

Source: textbook (`streamed.py` is the same by scans, for factors).
Deviates: nothing.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PRNGKeyArray

from jlora.algebra import LowRank
from jlora.core.adapter import Adapter
from jlora.merging.convert import converted
from jlora.merging.engine.inputs import Gathered, Ids, Weights, gather, keys_of, slice_weights
from jlora.merging.engine.options import lookup, split
from jlora.merging.engine.run import apply, checked, listed
from jlora.merging.engine.streamed import deltas, flip
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic, Tree

ROWS = 256  # of a block by default


class Block(NamedTuple):
    """A part of the merged delta: M[index][rows, columns] is `values`."""

    index: tuple[int, ...]  # of the slice, one number per stack axis; () without a stack
    rows: slice  # of d_in
    columns: slice  # of d_out
    values: np.ndarray  # [rows, columns], float32 (float64 where the adapters are)


def merged_delta(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Weights,
    site_path: str,
    *,
    row_block: int = ROWS,
    options: Mapping[str, Dynamic] | None = None,
    params: Tree = None,
    key: PRNGKeyArray | None = None,
    ids: Ids | None = None,
    missing: str = "error",
) -> Iterator[Block]:
    """The merged delta of one site in blocks, exact: added to the base they are the merged weight.

    The blocks of a slice come one after the other and cover it, each element once; slices come in
    the order of their index. ::

        for block in merged_delta("ties", adapters, [0.5, 0.5], path, options={"density": 0.2}):
            kernel[block.index][block.rows, block.columns] += block.values

    Args:
      name: of the method, a row of `table.METHODS`.
      adapters: a list of adapters of any methods and ranks, or a bank.
      weights: as `merge` takes them: [N], None (1/N each), or {path: [N] or [N, *stack]}.
      site_path: the site, one that the adapters have.
      row_block: rows of a block (DELLA: outputs), at least 1; memory is N row_block d_out elements.
        256: a block of 8 adapters and 4096 outputs is 32 MiB.
      options: of the method, by name, as `merge` takes them. `rank`, where it is given, is kept to:
        the delta is then the one that `merge` cuts to that rank. `solver` says how many rows are
        read at a time for thresholds.
      params: parameters, for methods without a factored delta (DoRA, OFT, ...), as in `merge`.
      key: of randomised methods; with the same key and ids the masks are those of `merge`.
      ids: [N], names of the adapters in their keys; 0..N-1 where it is None.
      missing: "error", or "zero": an adapter without the site adds nothing there.

    Yields:
      Blocks of M as host arrays.

    Raises:
      ValueError: as `merge` does; an unknown site; a block of less than one row; a method that
        merges all sites at once. Everything is checked before the first block is computed.
    """
    row = lookup(name)
    if params is not None:
        adapters = [converted(a, params) for a in listed(adapters)]
    given = gather(adapters, weights, missing=missing)
    return blocks(row, given, site_path, row_block=row_block, options=options, key=key, ids=ids)


def blocks(
    row: Merging,
    given: Gathered,
    site_path: str,
    *,
    row_block: int = ROWS,
    options: Mapping[str, Dynamic] | None = None,
    key: PRNGKeyArray | None = None,
    ids: Ids | None = None,
) -> Iterator[Block]:
    """`merged_delta` of adapters that are gathered already; `given.weights` are used.

    Args, Yields and Raises are those of `merged_delta`.

    Args:
      row: the method.
      given: the bank, its weights and sites, as `gather` returns them.

    Returns:
      Blocks of M as host arrays, one after the other.

    Raises:
      ValueError: as `merged_delta` does.
    """
    if row_block < 1:
        raise ValueError(f"row_block: got {row_block}, expected at least 1")
    if row.scope != "site":
        raise ValueError(f"{row.name}: merges all sites at once, expected a method of single sites")
    if site_path not in given.bank:
        raise ValueError(f"site: got {site_path!r}, expected one of {sorted(given.bank)}")
    low: Dynamic = given.bank[site_path]
    options = dict(options or {})
    n, stack = low.u.shape[0], low.u.shape[1:-2]
    checked(row, {site_path: low}, given.weights, key, options)
    flat = [t.reshape(n, -1, *t.shape[-2:]).swapaxes(0, 1) for t in low]
    bank, count = LowRank(*flat), math.prod(stack)
    weights = slice_weights(given.weights, site_path, n, count).astype(bank.u.dtype)
    keys = None
    if row.randomised and key is not None:
        keys = keys_of(key, site_path, count, n, ids)
    if row.rule is None or options.get("rank") is not None:
        part = {site_path: low}
        merged: Dynamic = apply(
            row, part, _only(given.weights, site_path), options, key=key, ids=ids
        )
        factors = LowRank(*(t.reshape(1, count, *t.shape[-2:]).swapaxes(0, 1)
                            for t in merged[site_path]))  # fmt: skip
        return _blocks(_alone, False, factors, weights[:, :1], None, {}, stack, row_block)
    solver = options.pop("solver", None)
    options.pop("rank", None)
    takes_block = "block" in inspect.signature(row.rule).parameters
    if solver is not None and takes_block:
        options["block"] = solver.block
    return _blocks(row.rule, row.by_outputs, bank, weights, keys, options, stack, row_block)


def _blocks(
    make: Callable[..., Dynamic], by_outputs: bool, bank: LowRank, weights: Array, keys: Dynamic,
    options: dict[str, Dynamic], stack: tuple[int, ...], row_block: int,
) -> Iterator[Block]:  # fmt: skip
    """The blocks of slices [S, N, ...]."""
    arrays, static = split(options)
    for s, index in enumerate(np.ndindex(*stack)):
        low = LowRank(bank.u[s], bank.v[s])
        low = flip(low) if by_outputs else low
        rule = _prepared(low, weights[s], None if keys is None else keys[s], arrays, make, static)
        rows, columns = low.u.shape[1], low.v.shape[-1]
        b = min(row_block, rows)
        for start in range(0, rows, b):
            stop = min(start + b, rows)
            u = low.u[:, start:stop]
            u = jnp.pad(u, [(0, 0), (0, b - (stop - start)), (0, 0)])  # one compilation
            values = np.asarray(_block(rule, u, low.v, jnp.int32(start)))[: stop - start]
            if by_outputs:
                yield Block(index, slice(0, columns), slice(start, stop), values.T)
            else:
                yield Block(index, slice(start, stop), slice(0, columns), values)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _prepared(
    low: LowRank, weights: Array, keys: Dynamic, arrays: Dynamic, make: Dynamic, static: Dynamic
) -> Dynamic:
    """The rule of a slice, a PyTree: thresholds and the like are computed here, once."""
    extra = {} if keys is None else {"keys": keys}
    return make(low, weights, **extra, **arrays, **dict(static))


@jax.jit
def _block(rule: Dynamic, u: Array, v: Array, start: Array) -> Array:
    """Rows of M from u [N, b, R], v [N, R, d_out]; row numbers from `start` on."""
    return rule(deltas(u, v), start + jnp.arange(u.shape[1], dtype=jnp.int32))


def _alone(low: LowRank, weights: Array) -> Dynamic:
    """The rule of factors that are merged already."""
    return jax.tree_util.Partial(_first)


def _first(d: Array, numbers: Array) -> Array:
    return d[0]


def _only(weights: Weights, path: str) -> Dynamic:
    return {path: weights[path]} if isinstance(weights, Mapping) else weights
