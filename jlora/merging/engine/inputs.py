"""What every merge reads and writes: adapters to a bank of factored deltas, and back.

====  ======================================================================
N     adapters
S     stack slices of a site (layers of a scanned block), flattened
R     rank, the largest of the bank: smaller ones are padded with zeros
====  ======================================================================

.. math:: \\{(u_n, v_n)\\}_{n \\le N} \\text{ with } \\Delta_n = u_n v_n, \\; w \\in R^N
          \\;\\mapsto\\; (u, v)

`gather` reads adapters (all scales folded in), `per_site` maps a merge of one site and one slice
over all of them, `to_adapter` writes a plain LoRA adapter. Sites of one shape run as one batch.
A randomised merge gets one key for each (site, slice, adapter), so that neither sharding nor the
order of sites changes its result.

Deviates: nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jlora import algebra
from jlora.algebra import Deltas, LowRank
from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Site
from jlora.merging.engine.keys import Ids as Ids
from jlora.merging.engine.keys import keys_of as keys_of
from jlora.merging.engine.keys import keys_of_sites
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic

# of N adapters: [N], or {path: [N] or [N, *stack]}
Weights = ArrayLike | Sequence[float] | Mapping[str, ArrayLike]


class Gathered(NamedTuple):
    """The inputs of a merge."""

    bank: Deltas  # path -> LowRank(u [N, *stack, d_in, R], v [N, *stack, R, d_out])
    weights: Dynamic  # [N], or path -> [N, *stack]
    sites: tuple[Site, ...]  # in the order of `bank`


def gather(
    adapters: Sequence[Adapter] | Adapter, weights: Weights | None = None, *, missing: str = "error"
) -> Gathered:
    """A bank of deltas from a list of adapters of any methods and ranks, or from one bank.

    Values are checked outside of transformations only.

    Args:
      adapters: a list of adapters, or one Adapter whose arrays lead with an axis of adapters.
      weights: [N], or {path: [N] or [N, *stack]} with every site; None: 1/N each.
      missing: "error": all adapters must have the same sites; "zero": an adapter without a site
        adds nothing there.

    Returns:
      Bank, weights and sites.

    Raises:
      ValueError: no adapters; other sites, shapes or dtypes; a method without a factored delta;
        values that are not finite; weights of another length; something that is no bank.
    """
    if isinstance(adapters, Adapter):
        every = [(adapters.sites, _bank(adapters))]
        size = next(iter(every[0][1].values())).u.shape[0]
    else:
        every = [(a.sites, _one(a, f"adapter {k}")) for k, a in enumerate(adapters)]
        size = len(every)
    if not every or not size:
        raise ValueError("adapters: got none, expected at least one")
    sites = _sites([s for s, _ in every], missing)
    bank: Deltas
    if isinstance(adapters, Adapter):
        bank = {site.path: every[0][1][site.path] for site in sites}
    else:
        bank = {site.path: _stack(site, [d for _, d in every]) for site in sites}
    _finite(bank)
    return Gathered(bank, _weights(weights, size, sites), sites)


def per_site(
    fn: Callable[..., LowRank],
    *,
    randomised: bool = False,
    loop: str = "vmap",
    ranks: tuple[str, ...] = (),
) -> Callable[..., Deltas]:
    """A merge of one site and one slice as a function of whole `Deltas`.

    Args:
      fn: `fn(bank, weights [N], **options)` of one site and slice.
      randomised: `fn` also gets `keys` [N], made of `key`, the path, the slice and `ids`.
      loop: "map" runs the slices one after the other, so that the memory is that of one; "vmap",
        the default, all at once.
      ranks: names of options that are at most min(d_in, d_out) of each site.

    Returns:
      A function of (bank, weights, key=None, ids=None, **options); ids [N] are 0..N-1 where None.

    Raises:
      ValueError: another `loop`; when called, a randomised merge without a key.
    """
    if loop not in ("vmap", "map"):
        raise ValueError(f"loop: got {loop!r}, expected 'vmap' or 'map'")

    def run(
        bank: Deltas,
        weights: Weights,
        key: Array | None = None,
        ids: Ids | None = None,
        **options: Dynamic,
    ) -> Deltas:
        if randomised and key is None:
            raise ValueError(f"{getattr(fn, '__name__', fn)}: got no key, expected one")

        def one(x: tuple[LowRank, Array, Dynamic]) -> LowRank:
            low, w, keys = x
            full = min(low.u.shape[-2], low.v.shape[-1])
            fitted = {k: min(options[k], full) for k in ranks if options.get(k) is not None}
            return fn(low, w, **({} if keys is None else {"keys": keys}), **{**options, **fitted})

        out: Deltas = {}
        for paths in _alike(bank):
            parts = []
            for path in paths:
                low = _slices(bank[path])
                s, n = low.u.shape[:2]
                parts.append((low, slice_weights(weights, path, n, s).astype(low.u.dtype)))
            keys = None
            if randomised and key is not None:
                every = [(p, low.u.shape[0]) for p, (low, _) in zip(paths, parts, strict=True)]
                keys = keys_of_sites(key, every, parts[0][0].u.shape[1], ids)
            joined = (*jax.tree.map(lambda *t: jnp.concatenate(t), *parts), keys)
            result = jax.vmap(one)(joined) if loop == "vmap" else lax.map(one, joined)
            start = 0
            for path, (low, _) in zip(paths, parts, strict=True):
                s, stack = low.u.shape[0], bank[path][0].shape[1:-2]
                part = (start, start + s, stack)
                out[path] = jax.tree.map(lambda t, part=part: _unflat(t, *part), result)
                start += s
        return {path: out[path] for path in bank}

    return run


def to_adapter(deltas: Deltas, sites: Sequence[Site]) -> Adapter:
    """A plain LoRA adapter of scale 1 from deltas.

    Args:
      deltas: {path: [*lead, *stack, ...]}; with `lead` the result is a bank.
      sites: the sites of the result.

    Returns:
      The adapter; alpha is the rank.

    Raises:
      ValueError: a site without delta, or a delta of another shape.
    """
    trainable, frozen, rows = {}, {}, []
    for site in sites:
        if site.path not in deltas:
            raise ValueError(f"{site.path}: got no delta, expected one of {sorted(deltas)}")
        u, v = algebra.low_rank(deltas[site.path])
        if (u.shape[-2], v.shape[-1]) != (site.d_in, site.d_out):
            got, expected = (u.shape[-2], v.shape[-1]), (site.d_in, site.d_out)
            raise ValueError(f"{site.path}: got a delta of {got}, expected {expected}")
        trainable[site.path] = {"a": u, "b": v}
        frozen[site.path] = {"scale": jnp.ones(u.shape[:-2], jnp.float32)}
        rank = u.shape[-1]
        rows.append((site, LoRA(rank=rank, alpha=float(rank))))
    return Adapter(trainable, frozen, tuple(rows))


def slice_weights(weights: Weights, path: str, size: int, slices: int) -> Array:
    """The weights of a site for each of its slices.

    Args:
      weights: [N], or {path: [N] or [N, *stack]}.
      path: the site.
      size: N.
      slices: S.

    Returns:
      [S, N].
    """
    w = weights[path] if isinstance(weights, Mapping) else weights
    w = jnp.asarray(w).reshape(size, -1)
    return jnp.broadcast_to(w, (size, slices)).T


def _read(adapter: Adapter, site: Site, method: Method, who: str) -> LowRank:
    where, name = f"{who}: {site.path}", type(method).__name__
    if not method.merges:
        raise ValueError(
            f"{where}: got {name}, whose delta depends on the activation; "
            "expected a method that merges"
        )
    try:
        one = algebra.deltas(adapter.replace(sites=((site, method),)))
    except TypeError as error:
        raise ValueError(
            f"{where}: got {name}, expected a method with a factored delta; "
            "jl.merging.to_lora converts it, given the parameters"
        ) from error
    low = algebra.low_rank(one[site.path])
    expected = (*site.stack, site.d_in, site.d_out)
    got = (*low.u.shape[:-1], low.v.shape[-1])
    if got != expected:
        raise ValueError(f"{where}: got a delta of {got}, expected {expected}")
    return low


def _one(adapter: Adapter, who: str) -> Deltas:
    return {site.path: _read(adapter, site, method, who) for site, method in adapter.sites}


def _bank(bank: Adapter) -> Deltas:
    sizes = {t.shape[:1] for t in jax.tree.leaves((bank.trainable, bank.frozen))}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"adapters: got one Adapter whose arrays lead with axes {sorted(sizes)}, "
            "expected a list of adapters, or a bank (jl.stack)"
        )
    if sizes == {(0,)}:
        raise ValueError("adapters: got a bank of none, expected at least one")
    return jax.vmap(lambda a: _one(a, "bank"))(bank)


def _sites(tables: list[tuple[tuple[Site, Method], ...]], missing: str) -> tuple[Site, ...]:
    if missing not in ("error", "zero"):
        raise ValueError(f"missing: got {missing!r}, expected 'error' or 'zero'")
    every: dict[str, Site] = {}
    for k, rows in enumerate(tables):
        for site, _ in rows:
            first = every.setdefault(site.path, dataclasses.replace(site, group=""))
            a, b = ((s.shape, s.kinds, str(s.dtype)) for s in (site, first))
            if a != b:
                raise ValueError(f"adapter {k}: {site.path}: got {a}, expected {b}: other bases")
    for k, rows in enumerate(tables):
        lacks = sorted(every.keys() - {site.path for site, _ in rows})
        if lacks and missing == "error":
            raise ValueError(
                f"adapter {k}: got no site {lacks[0]}, expected the sites of all adapters; "
                "missing='zero' counts it as a zero delta"
            )
    if not every:
        raise ValueError("adapters: got no sites, expected at least one")
    return tuple(every[path] for path in sorted(every))


def _stack(site: Site, every: list[Deltas]) -> LowRank:
    some = [d[site.path] for d in every if site.path in d]
    rank = max(low.u.shape[-1] for low in some)
    dtype = max((low.u.dtype for low in some), key=lambda d: d.itemsize)
    shape = (*site.stack, site.d_in, site.d_out)

    def pad(low: LowRank | None) -> LowRank:
        if low is None:
            u, v = jnp.zeros((*shape[:-1], rank)), jnp.zeros((*shape[:-2], rank, shape[-1]))
            return LowRank(u.astype(dtype), v.astype(dtype))
        lead, more = [(0, 0)] * len(site.stack), rank - low.u.shape[-1]
        u = jnp.pad(low.u, [*lead, (0, 0), (0, more)])
        v = jnp.pad(low.v, [*lead, (0, more), (0, 0)])
        return LowRank(u.astype(dtype), v.astype(dtype))

    padded = [pad(d.get(site.path)) for d in every]  # type: ignore[arg-type]
    return jax.tree.map(lambda *t: jnp.stack(t), *padded)


def _finite(bank: Deltas) -> None:
    if any(isinstance(t, jax.core.Tracer) for t in jax.tree.leaves(bank)):
        return
    good = {path: [jnp.isfinite(t).reshape(t.shape[0], -1).all(1) for t in d] for path, d in
            bank.items()}  # fmt: skip
    for path, (u, v) in jax.device_get(good).items():
        for k, fine in enumerate(u & v):
            if not fine:
                raise ValueError(f"adapter {k}: {path}: got nan or inf, expected finite values")


def _weights(weights: Weights | None, size: int, sites: tuple[Site, ...]) -> Dynamic:
    if weights is None:
        return jnp.full(size, 1.0 / size, jnp.float32)
    if isinstance(weights, Mapping):
        by_path = {site.path: site for site in sites}
        for path in weights.keys() ^ by_path.keys():
            raise ValueError(f"weights: {path}: expected exactly the sites {sorted(by_path)}")
        return {p: _checked(weights[p], f"weights: {p}", size, by_path[p].stack) for p in by_path}
    return _checked(weights, "weights", size, ())


def _checked(w: Dynamic, where: str, size: int, stack: tuple[int, ...]) -> Array:
    w = jnp.asarray(w, None if hasattr(w, "dtype") else jnp.float32)
    if w.shape not in {(size,), (size, *stack)}:
        raise ValueError(f"{where}: got shape {w.shape}, expected one for each of {size} adapters")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{where}: got {w.dtype}, expected floating point")
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        raise ValueError(f"{where}: got nan or inf, expected finite values")
    return w


def _alike(bank: Deltas) -> list[list[str]]:
    """The paths, in groups of one shape [d_in, R, d_out] and dtype."""
    groups: dict[Dynamic, list[str]] = {}
    for path, (u, v) in bank.items():  # type: ignore[misc]
        groups.setdefault((u.shape[-2:], v.shape[-2:], u.dtype), []).append(path)
    return list(groups.values())


def _unflat(t: Array, start: int, stop: int, stack: tuple[int, ...]) -> Array:
    return t[start:stop].reshape(*stack, *t.shape[1:])


def _slices(low: Dynamic) -> LowRank:
    """[N, *stack, p, q] as [S, N, p, q]."""
    n, stack = low.u.shape[0], low.u.shape[1:-2]
    s = math.prod(stack)
    u, v = (t.reshape(n, s, *t.shape[-2:]).swapaxes(0, 1) for t in low)
    return LowRank(u, v)
