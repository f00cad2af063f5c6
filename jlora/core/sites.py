"""`sites`: which leaves of the parameters feed which operations, found by an abstract walk.

The function is traced with every leaf lazy and its axes unknown; the matmul that uses a leaf tells
which axes are contracted ('i'), mapped or scanned over ('s') and left ('o'). Nothing runs.

Source: our reading.
Deviates: none.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.adapter import Adapter, Method, Site, initialise
from jlora.core.evaluate import Scope, evaluate
from jlora.core.lazy import Lazy, leaf
from jlora.core.lift import flatten, is_array, traced
from jlora.core.rules import RULES

MATMULS = ("gather", "dot", "conv")


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
            (s.path, " ".join(s.kinds), str(s.shape), jnp.dtype(s.dtype).name, ", ".join(s.ops))
            for s in self.rows
        ]
        width = [max((len(c[k]) for c in cells), default=0) for k in range(5)]
        lines = (
            "  ".join([c[k].ljust(width[k]) for k in range(5)] + [_flops(s.flops)]).rstrip()
            for c, s in zip(cells, self.rows, strict=True)
        )
        return "\n".join(lines)

    def select(self, methods: Mapping[str, Method]) -> list[tuple[Site, Method]]:
        """The sites of each pattern (`re.search` on the path, or "all-linear"), first match wins.

        A method that needs a matrix chooses among the leaves that a matmul, convolution or lookup
        consumes. Raises ValueError for no patterns, a bad regex, or a pattern without a site.
        """
        if isinstance(methods, Method):
            raise ValueError(
                f"methods: got {methods}, expected {{'all-linear': {methods}}} or such"
            )
        if not methods:
            raise ValueError("methods: got no patterns, expected {regex: Method}")
        chosen: dict[str, tuple[Site, Method]] = {}
        for number, (pattern, method) in enumerate(methods.items()):
            if not isinstance(method, Method):
                raise ValueError(f"methods[{pattern!r}]: got {method!r}, expected a Method")
            found = [s for s in self.rows if _matches(pattern, s) and _suits(method, s)]
            new = [s for s in found if s.path not in chosen]
            if not new:
                raise ValueError(self._unmatched(pattern, method, found))
            for s in new:
                chosen[s.path] = (dataclasses.replace(s, group=f"*{number}"), method)
        return [chosen[path] for path in sorted(chosen)]

    def _unmatched(self, pattern: str, method: Method, found: list[Site]) -> str:
        head = f"the pattern {pattern!r} of {method} "
        if found:
            return head + f"has no site left: earlier patterns took {[s.path for s in found]}"
        unsuited = [f"{s.path} ({', '.join(s.ops)})" for s in self.rows if _matches(pattern, s)]
        if unsuited:
            return head + f"matches only leaves that no matmul consumes whole: {unsuited}"
        paths = [s.path for s in self.rows if _suits(method, s)]
        plain = re.sub(r"[^\w/]+", "", pattern)
        near = sorted(paths, key=lambda p: -_likeness(plain, p))[:5]
        return head + f"matches no site; nearest: {near}"


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
        return "dot" in site.ops and not any(op.startswith("gather") for op in site.ops)
    try:
        return re.search(pattern, site.path) is not None
    except re.error as e:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {e}") from e


def _suits(method: Method, site: Site) -> bool:
    return "i" in site.kinds or type(method).vectors


def sites(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Sites:
    """The leaves of `params` that `fn(params, *args, **kwargs)` uses.

    Arrays may be abstract (`jax.ShapeDtypeStruct`). `ops` says what consumes a leaf: "dot", "conv",
    "gather", or the primitives for which it would have to be merged. FLOPs are of one call, a loop
    of unknown length counted once.
    """
    scope = Scope(RULES, {}, uses=[])
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
    uses: dict[str, list] = {}
    for w, op, kinds, flops in scope.uses or ():
        uses.setdefault(w.site.path, []).append((op, _kinds(w, kinds), flops, w.site))
    rows = (_site(found) for found in uses.values())
    return Sites(tuple(sorted(rows, key=lambda s: s.path)))


def _unknown(path: str, v: Any) -> Any:
    if not jnp.issubdtype(v.dtype, jnp.floating):
        return v
    site = Site(path, tuple(v.shape), "?" * len(v.shape), jnp.dtype(v.dtype))
    return leaf(v, site, None, {}, {})


def _kinds(w: Lazy, axes: Mapping[str, Any]) -> str | None:
    """One char an axis of the leaf; None where an axis has two roles."""
    roles: list[set[str]] = [set() for _ in w.site.shape]
    for axis, atoms in enumerate(w.dims):
        kind = next((k for k, where in axes.items() if axis in where), "o")
        for a in atoms:
            atom = w.atoms[a]
            if atom.kind == "s" and kind != "s":
                return None
            roles[atom.axis].add(kind)
    if any(len(r) > 1 for r in roles):
        return None
    return "".join(next(iter(r), "s") for r in roles)


def _site(found: list) -> Site:
    """What the uses of one leaf say together: a lookup tells in from out, else the largest dot."""
    site = found[0][3]
    best = sorted(
        (f for f in found if f[1] is not None),
        key=lambda f: (f[0] not in MATMULS, f[0] != "gather", -f[2]),
    )
    kinds = best[0][1] if best else "o" * len(site.shape)
    ops = tuple(dict.fromkeys(f[0] if f[1] else f"{f[0]} of a part" for f in found))
    return dataclasses.replace(site, kinds=kinds, ops=ops, flops=sum(f[2] for f in found))


def init(
    key: jax.Array,
    fn: Callable,
    params: Any,
    *args: Any,
    methods: Mapping[str, Method],
    **kwargs: Any,
) -> Adapter:
    """A fresh adapter beside `params` for the sites that the patterns of `methods` select.

    `methods` is {regex on paths, or "all-linear": Method}. The key is folded a path, so a site's
    init does not depend on the others. Raises ValueError as `Sites.select` does.
    """
    chosen = sites(fn, params, *args, **kwargs).select(methods)
    weights, _ = flatten(params)
    return initialise(key, chosen, weights)
