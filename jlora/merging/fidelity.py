"""A merge with its ranks, and what of the merged delta its factors leave out, measured.

=====  ==================================================================
M      the merged matrix of a slice of a site, as the method defines it
u v    the factors that are written, of rank r
=====  ==================================================================

.. math:: \\text{error} = \\|M - u v\\|_F, \\qquad
          \\text{relative} = \\Big( \\sum \\|M - u v\\|^2 \\Big/ \\sum \\|M\\|^2 \\Big)^{1/2}

M of an element-wise merge has full rank in general, so an adapter of rank N R leaves some of it
out: `dense.merged_delta` does not. The error costs one more pass over M by row blocks. The other
methods define M by factors: their error is that of `out_rank` alone, through the core.

Source: textbook.
Deviates: nothing.
"""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import PRNGKeyArray

from jlora import algebra
from jlora.algebra import Deltas, LowRank
from jlora.core.adapter import Adapter
from jlora.merging.convert import converted
from jlora.merging.engine.inputs import Ids, Weights, gather, keys_of, slice_weights, to_adapter
from jlora.merging.engine.options import check_rank, lookup, split
from jlora.merging.engine.run import apply, check_finite, checked, largest_rank, listed
from jlora.merging.engine.streamed import Solver, distance, flip
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic, Tree


class Merged(NamedTuple):
    """A merged adapter and how far it is from the merge as it is defined."""

    adapter: Adapter  # plain LoRA, scale 1
    ranks: dict[str, int]  # path -> rank of the factors, the same for all slices of a stack
    errors: dict[str, Array]  # path -> [*stack], |M - u v|, Frobenius
    norms: dict[str, Array]  # path -> [*stack], |M|
    total: Array  # [], error over all sites
    norm: Array  # [], |M| over all sites

    @property
    def relative(self) -> dict[str, Array]:
        """path -> [*stack], error / norm; 0 where M is 0."""
        return {p: _ratio(self.errors[p], self.norms[p]) for p in self.errors}

    @property
    def total_relative(self) -> Array:
        """[], error / norm over all sites."""
        return _ratio(self.total, self.norm)


def certified(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Weights | None = None,
    *,
    options: Mapping[str, Dynamic] | None = None,
    params: Tree = None,
    key: PRNGKeyArray | None = None,
    ids: Ids | None = None,
    missing: str = "error",
    out_rank: int | None = None,
) -> Merged:
    """`merge` with the ranks of the result and its errors.

    Args and Raises are those of `jlora.merging.merge`.

    Returns:
      The adapter, its ranks and errors: `Merged`.
    """
    row = lookup(name)
    if params is not None:
        adapters = [converted(a, params) for a in listed(adapters)]
    bank, w, sites = gather(adapters, weights, missing=missing)
    checked(row, bank, w, key, options or {})
    merged = apply(row, bank, w, options, key=key, ids=ids)
    cut = merged
    if out_rank is not None:
        check_rank("out_rank", out_rank, largest_rank(merged))
        cut = algebra.truncate(merged, out_rank).deltas
    check_finite(name, cut)
    errors, norms = distances(row, bank, w, merged, cut, key=key, ids=ids, options=options)
    return Merged(
        to_adapter(cut, sites),
        {p: algebra.low_rank(d).u.shape[-1] for p, d in cut.items()},
        errors,
        norms,
        _joined(errors),
        _joined(norms),
    )


def distances(
    row: Merging,
    bank: Deltas,
    weights: Weights,
    merged: Deltas,
    cut: Deltas,
    *,
    key: PRNGKeyArray | None = None,
    ids: Ids | None = None,
    options: Mapping[str, Dynamic] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """|M - u v| and |M| of each site and slice.

    Args:
      row: the method.
      bank: path -> deltas of N adapters.
      weights: [N], or {path: [N, *stack]}.
      merged: path -> what the method gives as factors.
      cut: path -> the factors that are written: `merged`, or of less rank.
      key, ids: of randomised methods, those that `merged` is drawn with.
      options: of the method.

    Returns:
      ({path: [*stack]}, {path: [*stack]}).
    """
    if row.rule is None:
        norms = _norms(merged)
        if cut is merged:
            return {p: jnp.zeros_like(n) for p, n in norms.items()}, norms
        return _norms(algebra.add(merged, algebra.scale(cut, -1.0))), norms
    given = dict(options or {})
    given.pop("rank", None)
    solver = given.pop("solver", None) or Solver()
    if "block" in inspect.signature(row.rule).parameters:
        given["block"] = solver.block
    arrays, static = split(given)
    kind = (row.rule, row.by_outputs, solver.block, static)
    errors, norms = {}, {}
    for path, low in bank.items():
        (n, *stack), count = low[0].shape[:-2], math.prod(low[0].shape[1:-2])
        parts = [t.reshape(n, count, *t.shape[-2:]).swapaxes(0, 1) for t in low]
        factors = [t.reshape(count, *t.shape[-2:]) for t in algebra.low_rank(cut[path])]
        w = slice_weights(weights, path, n, count).astype(low[0].dtype)
        keys = keys_of(key, path, count, n, ids) if row.randomised and key is not None else None
        error, norm = _measured(LowRank(*parts), LowRank(*factors), w, keys, arrays, kind)
        errors[path], norms[path] = error.reshape(*stack), norm.reshape(*stack)
    return errors, norms


@functools.partial(jax.jit, static_argnums=5)
def _measured(
    bank: LowRank, factors: LowRank, weights: Array, keys: Dynamic, arrays: Dynamic, kind: Dynamic
) -> tuple[Array, Array]:
    """(|M - u v|, |M|) [S] of slices [S, N, ...], one after the other."""
    make, by_outputs, block, static = kind

    def one(x: Dynamic) -> tuple[Array, Array]:
        low, merged, w, keys = x
        if by_outputs:
            low, merged = flip(low), flip(merged)
        rule = make(low, w, **({} if keys is None else {"keys": keys}), **arrays, **dict(static))
        return distance(low, rule, merged, block=block)

    return lax.map(one, (bank, factors, weights, keys))


def _norms(x: Deltas) -> dict[str, Array]:
    return {p: jnp.linalg.norm(s, axis=-1) for p, s in algebra.singular_values(x).items()}


def _joined(x: Mapping[str, Array]) -> Array:
    return jnp.sqrt(sum((jnp.sum(t**2) for t in x.values()), jnp.zeros((), jnp.float32)))


def _ratio(x: Array, y: Array) -> Array:
    some = y > 0
    return jnp.where(some, x / jnp.where(some, y, jnp.ones_like(y)), jnp.zeros_like(x))
