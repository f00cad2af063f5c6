"""`sites`: which leaves of the parameters feed which operations, found by an abstract walk.

The function is traced with every leaf lazy and its axes unknown; the matmul that uses a leaf shows
which axes are contracted ('i'), mapped or scanned over ('s') and left ('o'). Nothing runs.

Deviates: nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Key

from jlora.core.adapter import Adapter
from jlora.core.declared_stacks import with_stacks
from jlora.core.evaluate import evaluate
from jlora.core.init import initialise
from jlora.core.lazy import Lazy, leaf
from jlora.core.lift import flatten, is_array, traced
from jlora.core.method import Method
from jlora.core.rules import RULES
from jlora.core.scope import Record, Scope
from jlora.core.site import Site
from jlora.core.site_table import LOOPS, MATMULS, Sites, hides_matmul, holds_codes, may_be_matmul
from jlora.types import Dynamic, Tree


def sites(fn: Callable, params: Tree, /, *args: Dynamic, **kwargs: Dynamic) -> Sites:
    """The leaves of `params` that `fn(params, *args, **kwargs)` uses; nothing is run.

    Args:
      fn: any JAX function of a PyTree of parameters.
      params: the parameters; arrays may be abstract (`jax.ShapeDtypeStruct`), here and in the
        others.
      args: its further arguments.
      kwargs: its keyword arguments.

    Returns:
      The table of sites, sorted by path. `ops` says what consumes a leaf: "dot", "conv", "gather",
      or the primitives for which it would have to be merged. FLOPs are of one call; a loop of
      unknown length is counted once.
    """
    return _table(fn, params, args, kwargs)


def _table(
    fn: Callable, params: Dynamic, args: Dynamic, kwargs: Dynamic, merging: bool = False
) -> Sites:
    """`merging`: whether a matmul counts that sees a weight after what needs it merged."""
    scope = Scope(RULES, {}, record=Record(uses=[]))
    leaves, tree = jax.tree.flatten((params, args, kwargs))
    where = [k for k, v in enumerate(leaves) if is_array(v)]

    def walk(arrays):
        full = list(leaves)
        for k, v in zip(where, arrays, strict=True):
            full[k] = v
        params, args, kwargs = jax.tree.unflatten(tree, full)
        named, jaxpr, _ = traced(fn, params, args, kwargs)
        values = [_unknown(path, v) for path, v in named.items()]
        return [scope.dense(v) for v in evaluate(scope, jaxpr, values)]

    jax.eval_shape(walk, [leaves[k] for k in where])
    uses: dict[str, tuple[Site, list[_Use]]] = {}
    for w, op, axes, flops, refused in scope.uses or ():
        for site, share in w.leaves or ((w.site, 1.0),):
            kinds, views, merged = _kinds(w, site, axes)
            use = _Use(op, kinds, views, (*merged, *([refused] if refused else [])), bool(merged),
                       round(flops * share))  # fmt: skip
            uses.setdefault(site.path, (site, []))[1].append(use)
    rows = [_site(site, site_uses, merging) for site, site_uses in uses.values()]
    rows = [s for s in rows if "i" in s.kinds or hides_matmul(s) or not holds_codes(s.dtype)]
    return Sites(tuple(sorted(rows, key=lambda s: s.path)))


class _Use(NamedTuple):
    """One use of a leaf."""

    op: str  # what consumes it
    kinds: str | None  # one character per axis of the leaf; None where an axis has two roles
    views: tuple[str, ...]  # that change its rows or columns
    refused: tuple[str, ...]  # what needs it merged, with lines
    after: bool  # whether that comes before `op`
    flops: int


def _unknown(path: str, v: Dynamic) -> Dynamic:
    if not (jnp.issubdtype(v.dtype, jnp.floating) or (holds_codes(v.dtype) and len(v.shape) > 1)):
        return v
    site = Site(path, tuple(v.shape), "?" * len(v.shape), jnp.dtype(v.dtype))
    return leaf(v, site, None, {}, {})


def _kinds(
    w: Lazy, site: Site, axes: Mapping[str, Dynamic]
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """The kinds of one leaf of a value, its views, and what needs it merged before."""
    roles: list[set[str]] = [set() for _ in site.shape]
    clear = True
    for axis, dim in enumerate(w.dims):
        kind = next((k for k, where in axes.items() if axis in where), "o")
        for a in dim:
            atom = w.atoms[a]
            clear &= kind == "s" or atom.kind != "s"
            clear &= bool(atom.sources) or len(dim) > 1 or kind != "i" or atom.size == 1
            for path, k in atom.sources:
                if path == site.path:
                    roles[k].add(kind)
    kinds = "".join(min(r, default="s") for r in roles)
    views = []
    for name, changed in w.views:
        kinds_changed = {kinds[k] for path, k in changed if path == site.path} - {"s"}
        clear &= name != "gain" or len(kinds_changed) < 2
        if name == "transposed":  # the sum of a matrix and itself, the other way around
            clear &= len(kinds_changed) == 2 and len([k for k in kinds if k != "s"]) == 2
        kinds_changed = kinds_changed and not name.startswith("!")
        views += [name] if kinds_changed else []
    merged = dict.fromkeys(name[1:] for name, _ in w.views if name.startswith("!"))
    clear &= all(len(r) <= 1 for r in roles)
    return (kinds if clear else None), tuple(dict.fromkeys(views)), tuple(merged)


def _site(site: Site, site_uses: list[_Use], merging: bool) -> Site:
    """What the uses of one leaf say together: a lookup tells in from out, else the largest dot."""
    best = sorted(
        (u for u in site_uses if u.kinds is not None and (merging or not u.after)),
        key=lambda u: (u.op not in MATMULS, u.op != "gather", -u.flops),
    )
    # a vector's stack axes are known inside of functions with a gradient of their own, too
    best = best or [u for u in site_uses if u.kinds is not None and "i" not in u.kinds]
    kinds = best[0].kinds or "" if best else "o" * len(site.shape)

    def named(u):
        if u.after and not merging:
            return f"{u.op} after {u.refused[0].split(chr(39))[1]}"
        return u.op if u.kinds else f"{u.op} of a part"

    hidden = any(may_be_matmul(named(u), site.shape) and u.op not in LOOPS for u in site_uses)
    if merging and "i" not in kinds and hidden and len(site.shape) > 1:
        kinds = "s" * (len(site.shape) - 2) + "io"  # the usual layout: a kernel does not tell
    return dataclasses.replace(
        site,
        kinds=kinds,
        ops=tuple(dict.fromkeys(named(u) for u in site_uses)),
        flops=sum(u.flops for u in site_uses),
        views=tuple(dict.fromkeys(name for u in site_uses if "i" in kinds for name in u.views)),
        refused=()
        if merging and "i" in kinds
        else tuple(dict.fromkeys(r for u in site_uses for r in u.refused)),
    )


def init(
    key: Key[jax.Array, ""],
    fn: Callable,
    params: Tree,
    /,
    *args: Dynamic,
    methods: Mapping[str, Method | None],
    stacks: Mapping[str, int | Sequence[int]] | None = None,
    on_dense: str = "error",
    model_kwargs: Mapping[str, Dynamic] | None = None,
    **kwargs: Dynamic,
) -> Adapter:
    """A fresh adapter, separate from `params`, for the sites that the patterns of `methods` select.

    Args:
      key: of random values; folded with each path, so a site's arrays do not depend on other sites.
      fn: any JAX function of a PyTree of parameters, called as fn(params, *args, **kwargs,
        **model_kwargs).
      params: the parameters; abstract ones (`jax.ShapeDtypeStruct`) serve methods that read no
        weight.
      args: its further arguments; abstract ones serve.
      methods: {regex on paths, or "all-linear": Method, or None to leave out}; the first match
        wins.
      stacks: {regex on paths: axis or axes of the leaf} whose slices are matrices of their own,
        each with its own arrays, where the function uses them all at once: {"kv_einsum": 0}. None:
        only axes that the function scans, maps or indexes over.
      on_dense: "merge" also adapts weights that an operation needs merged before the matmul (masks,
        quantisation); `lift` is then called with the same. "error" refuses them, as `lift` does.
      model_kwargs: its keyword arguments that are called as one of `init`; None: none.
      kwargs: its other keyword arguments.

    Returns:
      The adapter.

    Raises:
      ValueError: another `on_dense`, and as `Sites.select` and `with_stacks`.
    """
    if on_dense not in ("error", "merge"):
        raise ValueError(f"on_dense: got {on_dense!r}, expected 'error' or 'merge'")
    kwargs |= dict(model_kwargs or {})
    table = _table(fn, params, args, kwargs, on_dense == "merge")
    chosen = Sites(tuple(with_stacks(table, stacks or {}))).select(methods)
    weights, _ = flatten(params)
    return initialise(key, chosen, weights)
