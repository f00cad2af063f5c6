"""`sites`: which leaves of the parameters feed which operations, found by an abstract walk.

The function is traced with every leaf lazy and its axes unknown; the matmul that uses a leaf tells
which axes are contracted ('i'), mapped or scanned over ('s') and left ('o'). Nothing runs.

Deviates: nothing.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.core.adapter import Adapter
from jlora.core.evaluate import evaluate
from jlora.core.init import initialise
from jlora.core.lazy import Lazy, leaf
from jlora.core.lift import flatten, is_array, traced
from jlora.core.method import Method
from jlora.core.rules import RULES
from jlora.core.scope import Record, Scope
from jlora.core.site import Site
from jlora.core.stacks import with_stacks

MATMULS = ("gather", "dot", "conv", "ragged_dot", "product")


@dataclasses.dataclass(frozen=True)
class Sites:
    """A table of sites; iterate over it, or print it."""

    rows: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Site:
        return next(s for s in self.rows if s.path == path)

    def __str__(self) -> str:
        cells = [
            (s.path, " ".join(s.kinds), str(s.shape), jnp.dtype(s.dtype).name, _uses(s))
            for s in self.rows
        ]
        width = [max((len(c[k]) for c in cells), default=0) for k in range(5)]
        lines = (
            "  ".join([c[k].ljust(width[k]) for k in range(5)] + [_flops(s.flops)]).rstrip()
            for c, s in zip(cells, self.rows, strict=True)
        )
        return "\n".join([*lines, *([_COST] if any(s.views for s in self.rows) else [])])

    def select(self, methods: Mapping[str, Method | None]) -> list[tuple[Site, Method]]:
        """The sites of each pattern (`re.search` on the path, or "all-linear"), first match wins.

        A method that needs a matrix chooses among the leaves that a matmul, convolution or lookup
        consumes; None leaves out what its pattern matches. Raises ValueError for no patterns, a bad
        regex, a pattern without a site, or weights that "all-linear" would have to leave out.
        """
        if isinstance(methods, Method):
            raise ValueError(
                f"methods: got {methods}, expected {{'all-linear': {methods}}} or such"
            )
        if not methods:
            raise ValueError("methods: got no patterns, expected {regex: Method}")
        chosen: dict[str, tuple[Site, Method | None]] = {}
        for number, (pattern, method) in enumerate(methods.items()):
            if not isinstance(method, Method | None):
                raise ValueError(f"methods[{pattern!r}]: got {method!r}, expected a Method or None")
            found = [s for s in self.rows if _matches(pattern, s) and _suits(method, s)]
            new = [s for s in found if s.path not in chosen]
            if pattern == "all-linear" and method is not None:
                self._check_none_left_out(new, chosen)
            if not new:
                raise ValueError(self._unmatched(pattern, method, found))
            codes = [_seen(s) for s in new if _coded(s.dtype)] if method is not None else []
            if codes:
                raise ValueError(_CODES.format(pattern=pattern, leaves="\n  ".join(codes)))
            for s in new:
                chosen[s.path] = (dataclasses.replace(s, group=f"*{number}"), method)
        return [(s, m) for _, (s, m) in sorted(chosen.items()) if m is not None]

    def _check_none_left_out(self, new: list[Site], chosen: Mapping[str, Any]) -> None:
        """Raises ValueError for weights that are linear in part, or that a call hides."""
        rest = [s for s in self.rows if s.path not in chosen and (s in new or _hidden(s))]
        out = [_seen(s) for s in rest if s.refused or s not in new]
        if out:
            raise ValueError(
                "the pattern 'all-linear' cannot adapt all weights:\n  " + "\n  ".join(out) + "\n"
                "leave each out by a pattern before it, {regex: None}, or give "
                "on_dense='merge' to init and lift where an operation needs the merged weight"
            )

    def _unmatched(self, pattern: str, method: Method | None, found: list[Site]) -> str:
        head = f"the pattern {pattern!r} of {method} "
        if found:
            return head + f"has no site left: earlier patterns took {[s.path for s in found]}"
        saw = "\nthe function uses:\n  " + "\n  ".join(_seen(s) for s in self.rows[:40])
        saw += f"\n  and {len(self.rows) - 40} more" if len(self.rows) > 40 else ""
        saw = saw if self.rows else "; the function uses no floating array of params at all"
        unsuited = [f"{s.path} ({', '.join(s.ops)})" for s in self.rows if _matches(pattern, s)]
        if unsuited:
            return head + f"matches only leaves that no matmul consumes whole: {unsuited}" + saw
        paths = [s.path for s in self.rows if _suits(method, s)]
        plain = re.sub(r"[^\w/]+", "", pattern)
        near = sorted(paths, key=lambda p: -_likeness(plain, p))[:5]
        return head + f"matches no site; nearest: {near}" + saw


def _seen(s: Site) -> str:
    """What takes a leaf, and why it is no site."""
    why = f"; needs the merged weight for {', '.join(s.refused)}" if s.refused else ""
    why += f"; holds {jnp.dtype(s.dtype).name} codes" if _coded(s.dtype) else ""
    if not why and any(op.endswith("of a part") for op in s.ops):
        why = "; one of its axes has two roles: repeated, or summed over here and kept there"
    return f"{s.path} {s.shape}: {_uses(s)}{why}"


_CODES = (
    "the pattern {pattern!r} matches integer codes of quantised weights, to which nothing can be "
    "added:\n  {leaves}\ngive the dequantised weights, or leaves with `dequantize()` as of "
    "jl.quantize, to the model that takes plain weights; or leave them out, {{regex: None}}"
)


def _coded(dtype: Any) -> bool:
    """Whether a matrix of this dtype may be the codes of a quantised weight."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits <= 8


LOOPS = ("scan", "while", "cond")
CALLS = (  # what may multiply with a weight where the walk does not look
    *(*LOOPS, "custom_jvp_call", "custom_vjp_call", "shard_map", "pallas_call", "tpu_custom_call"),
    *("dot_general", "conv_general_dilated", "ragged_dot_general", "ffi_call", "scaled_dot"),
)


def _hidden(s: Site) -> bool:
    """Whether a leaf that is no site is a weight still: something linear takes it."""
    if "i" in s.kinds:
        return False
    return any(_linear(op, s.shape) for op in s.ops)


def _linear(op: str, shape: tuple[int, ...]) -> bool:
    """Whether an operation that no rule takes may be a matmul with a leaf, or hide one."""
    if op.startswith(("dot ", "ragged_dot ")):  # after something, or of a part
        return True
    return op.split(" after ")[0] in CALLS and sum(n > 1 for n in shape) > 1


_COST = (
    "(view): methods with factors (LoRA, LoKr, ...) run on what is in view; the others (DoRA, "
    "OFT, ...) merge the weight there, as all methods do under custom_jvp and custom_vjp"
)


def _uses(s: Site) -> str:
    return ", ".join(s.ops) + (f" ({', '.join(s.views)})" if s.views else "")


def _likeness(text: str, path: str) -> float:
    match = difflib.SequenceMatcher(None, text, path)
    return sum(block.size for block in match.get_matching_blocks()) / max(len(text), 1)


def _flops(n: int) -> str:
    for unit, size in (("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6), ("kFLOP", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} FLOP" if n else ""


def _matches(pattern: str, site: Site) -> bool:
    if pattern == "all-linear":
        if any(op.startswith("gather") for op in site.ops):
            return False
        if {*MATMULS} & {*site.ops}:
            return bool({"dot", "ragged_dot"} & {*site.ops})
        return "i" in site.kinds and any(_linear(op, site.shape) for op in site.ops)
    try:
        return re.search(pattern, site.path) is not None
    except re.error as e:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {e}") from e


def _suits(method: Method | None, site: Site) -> bool:
    return method is None or "i" in site.kinds or type(method).vectors


def sites(fn: Callable, params: Any, /, *args: Any, **kwargs: Any) -> Sites:
    """The leaves of `params` that `fn(params, *args, **kwargs)` uses.

    Arrays may be abstract (`jax.ShapeDtypeStruct`). `ops` says what consumes a leaf: "dot", "conv",
    "gather", or the primitives for which it would have to be merged. FLOPs are of one call, a loop
    of unknown length counted once.
    """
    return _table(fn, params, args, kwargs)


def _table(fn: Callable, params: Any, args: Any, kwargs: Any, merging: bool = False) -> Sites:
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
    rows = [_site(site, found, merging) for site, found in uses.values()]
    rows = [s for s in rows if "i" in s.kinds or _hidden(s) or not _coded(s.dtype)]
    return Sites(tuple(sorted(rows, key=lambda s: s.path)))


class _Use(NamedTuple):
    """One use of a leaf."""

    op: str  # what consumes it
    kinds: str | None  # one character per axis of the leaf; None where an axis has two roles
    views: tuple[str, ...]  # that change its rows or columns
    refused: tuple[str, ...]  # what needs it merged, with lines
    after: bool  # whether that comes before `op`
    flops: int


def _unknown(path: str, v: Any) -> Any:
    if not (jnp.issubdtype(v.dtype, jnp.floating) or (_coded(v.dtype) and len(v.shape) > 1)):
        return v
    site = Site(path, tuple(v.shape), "?" * len(v.shape), jnp.dtype(v.dtype))
    return leaf(v, site, None, {}, {})


def _kinds(
    w: Lazy, site: Site, axes: Mapping[str, Any]
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
        mine = {kinds[k] for path, k in changed if path == site.path} - {"s"}
        clear &= name != "gain" or len(mine) < 2
        if name == "transposed":  # the sum of a matrix and itself, the other way around
            clear &= len(mine) == 2 and len([k for k in kinds if k != "s"]) == 2
        mine = mine and not name.startswith("!")
        views += [name] if mine else []
    merged = dict.fromkeys(name[1:] for name, _ in w.views if name.startswith("!"))
    clear &= all(len(r) <= 1 for r in roles)
    return (kinds if clear else None), tuple(dict.fromkeys(views)), tuple(merged)


def _site(site: Site, found: list[_Use], merging: bool) -> Site:
    """What the uses of one leaf say together: a lookup tells in from out, else the largest dot."""
    best = sorted(
        (u for u in found if u.kinds is not None and (merging or not u.after)),
        key=lambda u: (u.op not in MATMULS, u.op != "gather", -u.flops),
    )
    # a vector's stack axes are known inside of functions with a gradient of their own, too
    best = best or [u for u in found if u.kinds is not None and "i" not in u.kinds]
    kinds = best[0].kinds or "" if best else "o" * len(site.shape)

    def named(u):
        if u.after and not merging:
            return f"{u.op} after {u.refused[0].split(chr(39))[1]}"
        return u.op if u.kinds else f"{u.op} of a part"

    hidden = any(_linear(named(u), site.shape) and u.op not in LOOPS for u in found)
    if merging and "i" not in kinds and hidden and len(site.shape) > 1:
        kinds = "s" * (len(site.shape) - 2) + "io"  # the usual layout: a kernel does not tell
    return dataclasses.replace(
        site,
        kinds=kinds,
        ops=tuple(dict.fromkeys(named(u) for u in found)),
        flops=sum(u.flops for u in found),
        views=tuple(dict.fromkeys(name for u in found if "i" in kinds for name in u.views)),
        refused=()
        if merging and "i" in kinds
        else tuple(dict.fromkeys(r for u in found for r in u.refused)),
    )


def init(
    key: jax.Array,
    fn: Callable,
    params: Any,
    /,
    *args: Any,
    methods: Mapping[str, Method | None],
    stacks: Mapping[str, int | Sequence[int]] | None = None,
    on_dense: str = "error",
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Adapter:
    """A fresh adapter alongside `params` for the sites that the patterns of `methods` select.

    `stacks` is {regex on paths: axis or axes of the leaf} whose slices are matrices of their own,
    each with its own arrays, where the function uses them all at once: {"kv_einsum": 0}.

    `on_dense`: "merge" also adapts weights that an operation needs merged before the matmul (masks,
    quantisation); `lift` is then called with the same.

    `fn` is called as fn(params, *args, **kwargs, **model_kwargs): its own arguments may be called
    `key`, `fn` or `params`; those that are called `methods` or as another argument of `init` go
    into `model_kwargs`.

    `methods` is {regex on paths, or "all-linear": Method}. The key is folded a path, so a site's
    init does not depend on the others. Raises ValueError as `Sites.select` and `with_stacks` do.
    """
    if on_dense not in ("error", "merge"):
        raise ValueError(f"on_dense: got {on_dense!r}, expected 'error' or 'merge'")
    kwargs |= dict(model_kwargs or {})
    found = _table(fn, params, args, kwargs, on_dense == "merge")
    chosen = Sites(tuple(with_stacks(found, stacks or {}))).select(methods)
    weights, _ = flatten(params)
    return initialise(key, chosen, weights)
