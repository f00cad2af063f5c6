"""How far factors are from the merge that they stand for, and that merge itself where it is wanted.

=======  =======================================================================================
M        what a method means at a slice of a site, [d_in, d_out]; of an element-wise method of
         full rank, read by row blocks
U V      the factors that are written, of rank r
=======  =======================================================================================

.. math:: \\text{error} = |M - U V|_F, \\qquad
          \\text{total} = \\Big( \\sum_{\\text{sites}} \\text{error}^2 \\Big)^{1/2}

Methods that merge factors (PEFT's, spectral ones) mean their factors: there only what `rank` and
`out.rank` cut off counts.

Source: textbook.
Deviates: nothing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.algebra import Deltas, LowRank
from jlora.cli.merge.plan import Chunk, Plan, rule_of
from jlora.core.site import Site
from jlora.merging.engine import streamed
from jlora.merging.engine.inputs import keys_of
from jlora.merging.engine.run import bound
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic, Json


class Error(NamedTuple):
    """Of the factors of a site, all slices together."""

    rank: int
    full: int  # the rank beyond which nothing is cut
    error: float  # |M - U V|
    norm: float  # |M|

    @property
    def share(self) -> float:
        """The error over the norm; 0 where M is zero."""
        return self.error / self.norm if self.norm else 0.0


def reader(plan: Plan, bank: Deltas, seed: int) -> Callable[[Site, tuple[int, ...]], np.ndarray]:
    """What an element-wise method gives, dense.

    Args:
      plan: of the merge.
      bank: the deltas of all adapters.
      seed: of random masks.

    Returns:
      The function (site, slice) -> M, [d_in, d_out].
    """
    chunks = {path: chunk for chunk in plan.chunks for path in chunk.paths}

    def matrix(site: Site, index: tuple[int, ...]) -> np.ndarray:
        low, weights, keys = _slice(plan, bank, seed, site.path, index)
        frozen = _frozen(plan.row, chunks[site.path])
        return np.asarray(_dense(low, weights, keys, *frozen))

    return matrix


def errors(
    plan: Plan, chunk: Chunk, bank: Deltas, merged: Mapping[str, Dynamic],
    cut: Mapping[str, Dynamic], seed: int,
) -> dict[str, Error]:  # fmt: skip
    """The error at every site of a chunk.

    Args:
      plan: of the merge.
      chunk: sites that were merged in one call.
      bank: the deltas of all adapters.
      merged: path -> the factors that the method gave.
      cut: path -> those that are written.
      seed: of random masks.

    Returns:
      Path -> the error of all slices together.
    """
    by_site = {}
    for path in chunk.paths:
        u, v = cut[path]
        gaps, norms = [], []
        for index in np.ndindex(*u.shape[:-2]):
            if rule_of(plan.row) is not None:
                low, weights, keys = _slice(plan, bank, seed, path, index)
                written = LowRank(u[index], v[index])
                frozen = _frozen(plan.row, chunk)
                gap, norm = map(float, _distance(low, weights, keys, written, *frozen))
            else:
                gap, norm = _cut_off(plan, chunk, bank, merged, path, index, u.shape[-1])
            gaps.append(gap)
            norms.append(norm)
        full = min(u.shape[-2], v.shape[-1])
        by_site[path] = Error(u.shape[-1], full, _total(gaps), _total(norms))
    return by_site


def lines(by_site: Mapping[str, Error]) -> list[str]:
    """The errors as text, and their total.

    Args:
      by_site: path -> error.

    Returns:
      A line per site, and one for all.
    """
    out = [f"  rank {e.rank:4d} of {e.full:4d}  error {e.error:.3e} ({e.share:.2%})  {path}"
           for path, e in by_site.items()]  # fmt: skip
    total, norm = (_total([getattr(e, k) for e in by_site.values()]) for k in ("error", "norm"))
    out.append(f"error         {total:.3e} of {norm:.3e} in total "
               f"({total / norm if norm else 0:.2%})")  # fmt: skip
    return out


def data(by_site: Mapping[str, Error]) -> dict[str, dict[str, Json]]:
    """The errors for a file.

    Args:
      by_site: path -> error.

    Returns:
      What JSON can hold.
    """
    return {path: {**e._asdict(), "share": e.share} for path, e in by_site.items()}


def _cut_off(
    plan: Plan, chunk: Chunk, bank: Deltas, merged: Mapping[str, Dynamic], path: str,
    index: Dynamic, rank: int,
) -> tuple[float, float]:  # fmt: skip
    """(what a rank cuts off, norm) of a method that means its factors."""
    u, v = (np.asarray(t[index], np.float64) for t in merged[path])
    s = np.linalg.svd(np.linalg.qr(u)[1] @ np.linalg.qr(v.T)[1].T, compute_uv=False)
    lost = _total(s[rank:])
    if plan.row.certificate is not None and "rank" in chunk.options:
        one, weights, _ = _slice(plan, bank, 0, path, index)
        more = bound(plan.row, {"": one}, weights, chunk.options)
        lost = _total([lost, float(more[""])])
    return lost, _total([*s[:rank], lost])


def _slice(plan: Plan, bank: Deltas, seed: int, path: str, index: Dynamic) -> Dynamic:
    """(bank [N, ...], weights [N], keys [N] or None) of a slice of a site."""
    where = (slice(None), *index)
    low = LowRank(*(t[where] for t in bank[path]))
    weights = jnp.asarray(plan.weights[path][where], low.u.dtype)
    keys = None
    if plan.row.randomised:
        stack = bank[path][0].shape[1:-2]
        at = int(np.ravel_multi_index(index, stack)) if stack else 0
        keys = keys_of(jax.random.key(seed), path, max(int(np.prod(stack)), 1), len(weights))[at]
    return low, weights, keys


def _frozen(row: Merging, chunk: Chunk) -> tuple[Dynamic, ...]:
    options = tuple(sorted((k, v) for k, v in chunk.options.items() if k != "rank"))
    return rule_of(row), "della" in row.name, options


def _rule(
    low: LowRank, weights: Dynamic, keys: Dynamic, make: Dynamic, options: Dynamic
) -> Dynamic:
    extra = {} if keys is None else {"keys": keys}
    return make(low, weights, **extra, **dict(options))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _dense(
    low: LowRank, weights: Dynamic, keys: Dynamic, make: Dynamic, turned: bool, options: Dynamic
) -> Dynamic:
    low = streamed.flip(low) if turned else low
    m = streamed.dense(low, _rule(low, weights, keys, make, options))
    return m.T if turned else m


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _distance(
    low: LowRank,
    weights: Dynamic,
    keys: Dynamic,
    written: LowRank,
    make: Dynamic,
    turned: bool,
    options: Dynamic,
) -> Dynamic:
    low, written = (streamed.flip(x) if turned else x for x in (low, written))
    return streamed.distance(low, _rule(low, weights, keys, make, options), written)


def _total(values: Dynamic) -> float:
    return float(np.sqrt(np.sum(np.square(np.asarray(values, np.float64)))))
