"""`lift`: run a function on merged weights without ever merging them.

The function is traced once to a jaxpr. Adapted leaves enter its evaluation as lazy weights, which
rules carry through casts, transposes, reshapes, slices, scans, remat and branches; where one meets
a matmul, a convolution or a gather, the model's own operation runs on the base and the method adds
its part:

.. math:: \\mathrm{lift}(f)(\\theta, \\phi, x) = f(\\mathrm{merge}(\\theta, \\phi), x)

Deviates: nothing.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jlora.core import compat
from jlora.core.adapter import Adapter
from jlora.core.context import side_inputs
from jlora.core.evaluate import DenseWeightError as DenseWeightError
from jlora.core.evaluate import Scope, evaluate
from jlora.core.lazy import leaf
from jlora.core.rules import RULES
from jlora.core.site import Arrays, Site
from jlora.core.unread import check_reads
from jlora.types import Dynamic, Tree


def flatten(params: Tree) -> tuple[dict[str, Dynamic], Dynamic]:
    """The leaves of parameters by path.

    Args:
      params: a PyTree; leaves with `dequantize()` are not opened.

    Returns:
      ({path: leaf}, the tree); a path joins the keys, names and indices with '/'.

    Raises:
      ValueError: two leaves have the same path.
    """
    entries, tree = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda v: hasattr(v, "dequantize")
    )
    leaves = {path_string(path): value for path, value in entries}
    if len(leaves) < len(entries):
        raise ValueError("two leaves of params have the same path, as {'a/b': .., 'a': {'b': ..}}")
    return leaves, tree


def path_string(path: Sequence[Dynamic]) -> str:
    """The path of a leaf as text.

    Args:
      path: the keys that JAX gives for it.

    Returns:
      Its keys, names and indices, joined with '/'.
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def is_array(v: Dynamic) -> bool:
    """Whether a leaf is an array, abstract or quantised ones included.

    Args:
      v: any leaf.

    Returns:
      True for what has a shape and dtype, or `dequantize()`.
    """
    return hasattr(v, "dequantize") or (hasattr(v, "shape") and hasattr(v, "dtype"))


def traced(fn: Callable, params: Tree, args: Sequence[Dynamic], kwargs: Mapping[str, Dynamic]):
    """A function of parameters as a jaxpr of their arrays.

    Args:
      fn: fn(params, *args, **kwargs).
      params: a PyTree.
      args: further positional arguments.
      kwargs: keyword arguments.

    Returns:
      ({path: array} of the leaves that are arrays, jaxpr with one input each, tree of the outputs).
    """
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


def check(arrays: Mapping[str, Dynamic], adapter: Adapter) -> None:
    """Refuses an adapter that does not fit the parameters.

    Args:
      arrays: the parameters that are arrays, by path.
      adapter: one adapter.

    Raises:
      ValueError: a site is not among `arrays`, has another shape, is not floating, or its scale has
        the axes of a bank.
      TypeError: as `check_adapter`.
    """
    check_adapter(adapter)
    for site, _ in adapter.sites:
        if site.path not in arrays:
            near = difflib.get_close_matches(site.path, arrays, n=3, cutoff=0.0)
            raise ValueError(f"the adapter's site {site.path} is not in params; nearest: {near}")
        got = tuple(arrays[site.path].shape)
        if got != site.shape:
            raise ValueError(f"{site.path}: got shape {got}, expected {site.shape}")
        dtype = arrays[site.path].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{site.path}: got {jnp.dtype(dtype).name}, expected a floating array, or a leaf "
                "with dequantize() as of jl.quantize"
            )
        scale = adapter.frozen.get(site.path, {}).get("scale")
        if scale is not None and scale.shape != site.stack:
            raise ValueError(
                f"{site.path}: got a scale of shape {scale.shape}, expected {site.stack}; "
                "of a bank, pick one adapter or map over all with jax.vmap"
            )


def check_adapter(adapter: Dynamic) -> Adapter:
    """Refuses what is not an adapter, as where it was forgotten in a call.

    Args:
      adapter: what was given.

    Returns:
      The adapter itself.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(adapter, Adapter):
        shape = f" of shape {adapter.shape}" if is_array(adapter) else ""
        raise TypeError(
            f"adapter: got {type(adapter).__name__}{shape}, expected an Adapter of jl.init; "
            "a lifted function is called as tuned(params, adapter, *args)"
        )
    return adapter


def _given(adapter: Dynamic) -> Adapter:
    """An adapter; an empty one for {} and None."""
    if adapter is None or (isinstance(adapter, Mapping) and not adapter):
        return Adapter({}, {}, ())
    return check_adapter(adapter)


def lift(
    fn: Callable, *, aux: bool = False, on_dense: str = "error", unread: str = "error"
) -> Callable:
    """`fn(params, *args)` -> `tuned(params, adapter, *args, ctx=None)`, equal on merged weights.

    Args:
      fn: any JAX function of a PyTree of parameters.
      aux: also return what methods report, {site path: report}; reports of a scan have a leading
        axis
        of steps, a site's second use in one scope is called "path#2". False: few methods report.
      on_dense: "error" refuses an operation for which a weight must be merged; "merge" merges it
        there.
        "error", so that no dense gradient goes unnoticed.
      unread: "error" refuses an adapter with weights that `fn` never reads from its parameters, as
        where it closes over copies of its own; "allow" is for a part of a model (one encoder).
        "error",
        as such weights would be ignored silently.

    Returns:
      A function of (params, adapter, /, *args, ctx=None, model_kwargs=None, **kwargs).
      `adapter` may be empty ({} or None). `ctx` is a dict of side inputs for the methods (`key` for
      dropout, token masks, ...); `PerSite` and `per_layer` give sites and layers values of their
      own.
      `fn` is called as fn(params, *args, **kwargs, **model_kwargs): a keyword of its own that is
      called
      `ctx` goes into `model_kwargs`. When called it raises DenseWeightError for a weight that
      cannot
      stay lazy (path, primitive and source line); ValueError for sites that are not in params or
      have
      another shape, or that `fn` does not read; TypeError where the adapter was forgotten.

    Raises:
      ValueError: another `on_dense` or `unread`.
    """
    if on_dense not in ("error", "merge"):
        raise ValueError(f"on_dense: got {on_dense!r}, expected 'error' or 'merge'")
    if unread not in ("error", "allow"):
        raise ValueError(f"unread: got {unread!r}, expected 'error' or 'allow'")

    # jax.jit names arguments by the signature: `fn` may have keywords called params and adapter
    def tuned(params_, adapter_, /, *args, ctx=None, model_kwargs=None, **kwargs):
        params, adapter = params_, _given(adapter_)
        kwargs = {**kwargs, **(model_kwargs or {})}
        leaves, _ = flatten(params)
        quantised = any(hasattr(v, "dequantize") for v in leaves.values())
        if not adapter.sites and not quantised:
            out = fn(params, *args, **kwargs)
            return (out, {}) if aux else out
        arrays, jaxpr, tree = traced(fn, params, args, kwargs)
        common, side = side_inputs(ctx or {}, adapter.sites)
        values = lazy_leaves(arrays, adapter, side)
        if unread == "error":
            check_reads(jaxpr, arrays, (site.path for site, _ in adapter.sites))
        scope = Scope(RULES, common, on_dense, aux)
        out = [scope.dense(v) for v in evaluate(scope, jaxpr, values)]
        out = jax.tree.unflatten(tree, out)
        return (out, scope.aux) if aux else out

    return tuned


def lazy_leaves(
    arrays: Mapping[str, Dynamic], adapter: Adapter, side: Mapping[str, Arrays]
) -> list[Dynamic]:
    """The leaves of the parameters, those lazy that the adapter changes or that are quantised.

    Args:
      arrays: the parameters that are arrays, by path.
      adapter: one adapter.
      side: the side inputs of sites, {path: {name: array}}.

    Returns:
      One value per array, in their order.

    Raises:
      ValueError, TypeError: as `check`.
    """
    check(arrays, adapter)
    methods = {site.path: (site, method) for site, method in adapter.sites}

    def one(path, v):
        if path in methods:
            site, method = methods[path]
            own, shared = adapter.arrays(site)
            return leaf(v, site, method, own | side.get(path, {}), shared)
        if hasattr(v, "dequantize"):
            site = Site(path, tuple(v.shape), "?" * len(v.shape), v.dtype)
            return leaf(v, site, None, {}, {})
        return v

    return [one(path, v) for path, v in arrays.items()]
