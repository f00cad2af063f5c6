"""`lift`: run a function on merged weights without ever merging them.

The function is traced once to a jaxpr. Adapted leaves enter its evaluation as lazy weights, which
rules carry through casts, transposes, reshapes, slices, scans, remat and branches; where one meets
a matmul, a convolution or a gather, the model's own operation runs on the base and the method adds
its part:

.. math:: \\mathrm{lift}(f)(\\theta, \\phi, x) = f(\\mathrm{merge}(\\theta, \\phi), x)

Source: our reading (an evaluator of jaxprs, as JAX's documentation describes it).
Deviates: none.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jlora.core import compat
from jlora.core.adapter import Adapter, Site, key_of
from jlora.core.lazy import Lazy, leaf


class DenseWeightError(ValueError):
    """A weight met an operation that needs it merged."""


@dataclasses.dataclass
class Scope:
    """What one trace knows besides values; every scan body, branch, ... has its own."""

    ctx: Mapping[str, Any]  # side inputs of the methods; `key` is folded a step and a site
    on_dense: str = "error"
    reporting: bool = False  # whether the caller wants the side outputs
    uses: list | None = None  # where the abstract walk writes down who consumes what
    times: int = 1  # how often this scope runs
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)  # side outputs
    calls: dict[str, int] = dataclasses.field(default_factory=dict)  # reports so far, by path
    turns: dict[str, int] = dataclasses.field(default_factory=dict)  # uses so far, by path

    forks: int = 0  # bodies so far
    latest: "Scope | None" = None  # of a template: the last scope made from it

    def fork(self, times: int = 1) -> "Scope":
        """A template for the scopes of a body that is traced apart and runs `times` times."""
        self.forks += 1
        ctx = dict(self.ctx)
        if "key" in ctx:
            ctx["key"] = jax.random.fold_in(ctx["key"], self.forks)
        return dataclasses.replace(self, ctx=ctx, times=self.times * times, forks=0)

    def child(self, step: Any = None) -> "Scope":
        """A fresh scope of a template, however often JAX traces it; `step` tells runs apart."""
        ctx = dict(self.ctx)
        if step is not None and "key" in ctx:
            ctx["key"] = jax.random.fold_in(ctx["key"], step)
        uses = None if self.uses is None else []
        self.latest = dataclasses.replace(
            self, ctx=ctx, uses=uses, aux={}, calls={}, turns={}, forks=0
        )
        return self.latest

    def join(self, template: "Scope", aux: Mapping[str, Any]) -> None:
        """Takes over what a body noted and, as values of this trace, reported."""
        if self.uses is not None and template.latest is not None:
            self.uses.extend(template.latest.uses or ())
        for name, report in aux.items():
            self.report(name.split("#")[0], report)

    def report(self, path: str, report: Any) -> None:
        """What a method tells; the second use of a site in a scope is called path#2."""
        if self.reporting:
            n = self.calls[path] = self.calls.get(path, 0) + 1
            self.aux[path if n == 1 else f"{path}#{n}"] = report

    def enter(self, site: Site) -> dict[str, Any]:
        """The ctx of this use of a site."""
        n = self.turns[site.path] = self.turns.get(site.path, 0) + 1
        ctx = dict(self.ctx)
        if "key" in ctx:
            ctx["key"] = key_of(ctx["key"], f"{site.path}#{n}")
        return ctx

    def note(self, w: Lazy, op: str, kinds: Mapping[str, Sequence[int]], flops: int) -> None:
        """A use, in the abstract walk: the axes of `w` that are 'i' and 's'; others are 'o'."""
        assert self.uses is not None
        self.uses.append((w, op, kinds, flops * self.times))

    def dense(self, value: Any, eqn: Any = None) -> Any:
        """`value`, merged if it is lazy; an error unless that is allowed or costs nothing."""
        if not isinstance(value, Lazy):
            return value
        if self.uses is not None:
            self.note(value, eqn.primitive.name if eqn else "return", {}, 0)
            return value.view()
        cheap = value.method is None or "i" not in value.site.kinds
        if not cheap and self.on_dense != "merge":
            what = f"'{eqn.primitive.name}' at {compat.source(eqn)}" if eqn else "returning it"
            raise DenseWeightError(
                f"{value.site.path} {value.site.shape}: {what} needs the merged weight "
                f"{value.shape}; use it in a matmul, convolution or lookup only, leave it out of "
                "the adapter, or allow it with lift(fn, on_dense='merge')"
            )
        return value.merged()


def evaluate(scope: Scope, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr on values of which some are lazy; lazy ones may come out."""
    from jlora.core.rules import RULES

    jaxpr, consts = compat.opened(jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with compat.located(eqn):
            out = None
            if any(isinstance(v, Lazy) for v in values):
                rule = RULES.get(eqn.primitive.name)
                out = rule(scope, eqn, *values) if rule else None
                values = [scope.dense(v, eqn) for v in values] if out is None else values
            out = compat.bind(eqn, values) if out is None else out
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def flatten(params: Any) -> tuple[dict[str, Any], Any]:
    """{path: leaf} and the tree; a path joins the keys, names and indices with '/'."""
    entries, tree = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda v: hasattr(v, "dequantize")
    )
    return {path_string(path): value for path, value in entries}, tree


def path_string(path: Sequence[Any]) -> str:
    def one(k):
        return next((getattr(k, n) for n in ("key", "name", "idx") if hasattr(k, n)), k)

    return "/".join(str(one(k)) for k in path)


def is_array(v: Any) -> bool:
    return hasattr(v, "dequantize") or (hasattr(v, "shape") and hasattr(v, "dtype"))


def traced(fn: Callable, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]):
    """(leaves by path, those of them that are arrays, jaxpr of the latter, tree of the outputs)."""
    leaves, tree = flatten(params)
    arrays = {path: v for path, v in leaves.items() if is_array(v)}

    def of_arrays(values):
        full = {**leaves, **dict(zip(arrays, values, strict=True))}
        return fn(jax.tree.unflatten(tree, [full[path] for path in leaves]), *args, **kwargs)

    avals = [
        jax.ShapeDtypeStruct(v.shape, v.dtype) if hasattr(v, "dequantize") else v
        for v in arrays.values()
    ]
    jaxpr, shapes = compat.trace(of_arrays, avals)
    return arrays, jaxpr, jax.tree.structure(shapes)


def check(arrays: Mapping[str, Any], adapter: Adapter) -> None:
    """Raises ValueError where a site is not a leaf of the parameters of the expected shape."""
    for site, _ in adapter.sites:
        if site.path not in arrays:
            near = difflib.get_close_matches(site.path, arrays, n=3, cutoff=0.0)
            raise ValueError(f"the adapter's site {site.path} is not in params; nearest: {near}")
        got = tuple(arrays[site.path].shape)
        if got != site.shape:
            raise ValueError(f"{site.path}: got shape {got}, expected {site.shape}")


def lift(fn: Callable, *, aux: bool = False, on_dense: str = "error") -> Callable:
    """`fn(params, *args)` -> `tuned(params, adapter, *args, ctx=None)`, equal on merged weights.

    Args:
      fn: any JAX function of a PyTree of parameters.
      aux: also return what methods report, {site path: report}; reports made inside a scan have a
        leading axis of steps, a site's second use in one scope is called "path#2".
      on_dense: "error" refuses an operation for which a weight must be merged; "merge" merges
        it there.

    Returns:
      A function of (params, adapter, *args, **kwargs). `adapter` may be empty ({} or None).
      `ctx` is a dict of side inputs for the methods (`key` for dropout, token masks, ...).

    Raises (when called):
      DenseWeightError: a weight cannot stay lazy; names path, primitive and source line.
      ValueError: sites that are not in params or have another shape.
    """
    if on_dense not in ("error", "merge"):
        raise ValueError(f"on_dense: got {on_dense!r}, expected 'error' or 'merge'")

    def tuned(params, adapter, *args, ctx=None, **kwargs):
        leaves, _ = flatten(params)
        quantised = any(hasattr(v, "dequantize") for v in leaves.values())
        if not adapter and not quantised:
            out = fn(params, *args, **kwargs)
            return (out, {}) if aux else out
        arrays, jaxpr, tree = traced(fn, params, args, kwargs)
        values = lazy_leaves(arrays, adapter or Adapter({}, {}, ()))
        scope = Scope(dict(ctx or {}), on_dense, aux)
        out = [scope.dense(v) for v in evaluate(scope, jaxpr, values)]
        out = jax.tree.unflatten(tree, out)
        return (out, scope.aux) if aux else out

    return tuned


def lazy_leaves(arrays: Mapping[str, Any], adapter: Adapter) -> list[Any]:
    """The leaves, those lazy that the adapter changes or that are quantised."""
    check(arrays, adapter)
    methods = {site.path: (site, method) for site, method in adapter.sites}

    def one(path, v):
        if path in methods:
            site, method = methods[path]
            return leaf(v, site, method, *adapter.arrays(site))
        if hasattr(v, "dequantize"):
            site = Site(path, tuple(v.shape), "?" * len(v.shape), v.dtype)
            return leaf(v, site, None, {}, {})
        return v

    return [one(path, v) for path, v in arrays.items()]
