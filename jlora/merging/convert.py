"""Any mergeable adapter as a plain LoRA adapter, by rank, energy or error, with a certificate.

======  ==========================================================================
Δ       delta of one slice of a site, [d_in, d_out], of singular values s_i
r       rank kept at a site, the same for all slices of a stack
======  ==========================================================================

.. math::
    \\Delta_r = \\sum_{i \\le r} s_i x_i y_i^T, \\qquad
    \\|\\Delta - \\Delta_r\\|_F = \\Big( \\sum_{i > r} s_i^2 \\Big)^{1/2}

`rank` bounds r. `energy` in (0, 1] keeps, at each site, that share of the squared norm. `error` in
[0, 1) bounds the relative error over all sites together; it cuts the smallest singular values
wherever they are, which needs the least total rank. With none of them nothing is cut.

Methods with a factored delta (LoRA, LoHa, LoKr, VeRA, PiSSA, ...) are converted on their factors.
The others (DoRA, OFT, IA3, HiRA) need the parameters: the delta merge(w, p) - w is formed for one
slice of one site at a time, twice where the rank depends on the spectrum.

Paper: Eckart and Young 1936.
Source: textbook. PEFT's `convert_to_lora` takes a rank or an energy and no error.
Deviates: nothing.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jlora import algebra, numerics
from jlora.algebra import LowRank
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lazy import merged
from jlora.core.lift import check, flatten, is_array
from jlora.core.method import Method
from jlora.core.site import Arrays, Site, fold
from jlora.merging.engine.inputs import to_adapter
from jlora.system import System
from jlora.types import Dynamic, Tree


class Converted(NamedTuple):
    """A LoRA adapter and how far it is from what it was made of."""

    adapter: Adapter  # every site a LoRA of scale 1, balanced where it was cut
    errors: dict[str, Array]  # path -> [*stack], Frobenius norm of what was cut off
    norms: dict[str, Array]  # path -> [*stack], norm of the delta before
    total: Array  # [], error over all sites, absolute


def to_lora(
    adapter: Adapter,
    params: Tree = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
) -> Converted:
    """The adapter as LoRA. Jit-able without `energy` and `error`.

    Args:
      adapter: one adapter of any methods, no bank.
      params: the parameters it was made for; None: they are not needed, as all deltas are factored.
      rank: of the result, at least 1; None: nothing is cut.
      energy: share of each site's squared norm that is kept, in (0, 1]; None: nothing is cut.
      error: relative error over all sites together, in [0, 1); None: nothing is cut.

    Returns:
      The adapter with its errors: `Converted`.

    Raises:
      ValueError: a delta that depends on the activation; parameters that are needed and not given,
        or that lack a site; two budgets, or one outside of its range.
    """
    one_adapter(adapter, "to_lora")
    _check_budget(rank, energy, error)
    weights: Mapping[str, Dynamic] = {}
    if params is not None:
        weights = {k: v for k, v in flatten(params)[0].items() if is_array(v)}
        check(weights, adapter)
    spectra: dict[str, Array] = {}
    for site, method in adapter.sites:
        if not method.merges:
            raise ValueError(
                f"{site.path}: got {type(method).__name__}, whose delta depends on the "
                "activation; expected a method that merges"
            )
        if not factored(adapter, site, method) and params is None:
            raise ValueError(
                f"{site.path}: got {type(method).__name__} and no params, which its delta needs"
            )
        if energy is not None or error is not None:
            spectra[site.path] = _values(adapter, site, method, weights)
    ranks = _ranks(adapter, spectra, rank, energy, error)
    kept, errors, norms = {}, {}, {}
    for site, method in adapter.sites:
        kept[site.path], errors[site.path], norms[site.path] = _cut(
            adapter, site, method, weights, ranks[site.path]
        )
    total = jnp.sqrt(sum((jnp.sum(e**2) for e in errors.values()), jnp.zeros(())))
    return Converted(to_adapter(kept, [s for s, _ in adapter.sites]), errors, norms, total)


def converted(adapter: Adapter, params: Tree) -> Adapter:
    """The adapter itself where all deltas are factored, else as LoRA, exactly.

    Raises ValueError as `to_lora` does.

    Args:
      adapter: one adapter of any methods.
      params: the parameters that it was made for.

    Returns:
      An adapter whose deltas are all factored.
    """
    check({k: v for k, v in flatten(params)[0].items() if is_array(v)}, adapter)
    if all(factored(adapter, *row) for row in adapter.sites):
        return adapter
    return to_lora(adapter, params).adapter


def factored(adapter: Adapter, site: Site, method: Method) -> bool:
    """Whether a site's delta is read off its arrays without the weight.

    Args:
      adapter: the adapter that holds the site's arrays.
      site: the site.
      method: its method.

    Returns:
      False where the delta needs the weight, or the activation.
    """
    if not method.merges:
        return False
    try:
        jax.eval_shape(lambda a: algebra.deltas(a.replace(sites=((site, method),))), adapter)
    except TypeError:
        return False
    return True


def _check_budget(rank, energy, error):
    if sum(b is not None for b in (rank, energy, error)) > 1:
        raise ValueError(f"budget: got {rank=} {energy=} {error=}, expected at most one of them")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy: got {energy}, expected 0 < energy <= 1")
    if error is not None and not 0.0 <= error < 1.0:
        raise ValueError(f"error: got {error}, expected 0 <= error < 1")


def _ranks(adapter, spectra, rank, energy, error) -> dict[str, int | None]:
    if energy is None and error is None:
        return {site.path: rank for site, _ in adapter.sites}
    values = {p: np.asarray(s, np.float64).reshape(-1, s.shape[-1]) for p, s in spectra.items()}
    if error is not None:
        every = np.sort(np.concatenate([s.ravel() for s in values.values()]) ** 2)
        cut = np.cumsum(every) <= error**2 * every.sum()
        least = every[cut.sum()] if cut.sum() < every.size else np.inf
        return {p: max(1, int((s**2 >= least).sum(1).max())) for p, s in values.items()}
    share = 1.0 if energy is None else energy
    ranks: dict[str, int | None] = {}
    for path, s in values.items():
        tail = np.cumsum(s[:, ::-1] ** 2, axis=1)[:, ::-1]  # what goes with all from i on
        ranks[path] = max(1, int((tail > (1.0 - share) * tail[:, :1]).sum(1).max()))
    return ranks


def _values(adapter: Adapter, site: Site, method: Method, weights: Mapping[str, Dynamic]) -> Array:
    if factored(adapter, site, method):
        return algebra.singular_values(adapter.replace(sites=((site, method),)))[site.path]
    own, shared = adapter.arrays(site)
    s = _dense(weights[site.path], own, shared, site, method, None)
    return s.reshape(*site.stack, -1)


def _cut(
    adapter: Adapter, site: Site, method: Method, weights: Mapping[str, Dynamic], rank: int | None
) -> tuple[LowRank, Array, Array]:
    """(delta, error [*stack], norm [*stack]) of a site."""
    if not factored(adapter, site, method):
        own, shared = adapter.arrays(site)
        k = min(site.d_in, site.d_out) if rank is None else min(rank, site.d_in, site.d_out)
        u, s, v = _dense(weights[site.path], own, shared, site, method, k)
        u, s, v = (t.reshape(*site.stack, *t.shape[1:]) for t in (u, s, v))
    else:
        one = algebra.deltas(adapter.replace(sites=((site, method),)))
        if rank is None:
            low = algebra.low_rank(one[site.path])
            norm = jnp.linalg.norm(algebra.singular_values(one)[site.path], axis=-1)
            return low, jnp.zeros(site.stack, norm.dtype), norm
        u, s, v = algebra.svd(one)[site.path]
    k = min(rank or s.shape[-1], u.shape[-1])
    low = algebra.balanced(algebra.SVD(u[..., :k], s[..., :k], v[..., :k, :]))
    return low, jnp.linalg.norm(s[..., k:], axis=-1), jnp.linalg.norm(s, axis=-1)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _dense(w: Dynamic, own: Arrays, shared: Arrays, site: Site, method: Method, rank: int | None):
    """Singular values [S, k] of the slices' deltas, or with `rank` (u, s, v), slice by slice."""
    w = fold(w.dequantize() if hasattr(w, "dequantize") else w, site.kinds)
    count = math.prod(site.stack)
    flat = jax.tree.map(lambda t: t.reshape(count, *t.shape[len(site.stack) :]), (w, own))

    def one(pair: tuple[Array, Arrays]) -> Dynamic:
        m, arrays = pair
        after = merged(method, m, arrays, shared, 0)
        d = after - m.astype(after.dtype)
        if rank is None:
            return numerics.svd(d, compute_uv=False)
        u, s, v = numerics.svd(d)
        return u[:, :rank], s, v[:rank]

    return lax.map(one, flat)


SYSTEM = System(
    name="Conversion to LoRA",
    paper="Eckart 1936 (textbook)",
    symbol="to_lora",
    evidence="exact certificate by rank, energy and error; least total rank; one dense slice at a "
    "time",
    kind="component",
)
