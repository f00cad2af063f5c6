"""Side inputs of methods that have a value for each site, and for each layer of a stack.

They travel among the arrays of the lazy weight, with the same leading stack axes. So whatever
slices, scans, gathers or maps a layer out of the weight takes its side inputs along, and scanned
layers get what unrolled ones do.

Reference: none.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from jlora.core.lazy import SIDE
from jlora.core.method import Method
from jlora.core.site import Arrays, Site
from jlora.types import Dynamic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerSite:
    """A value of `lift(..., ctx={name: PerSite(values)})` that differs between sites.

    Args:
      values: {regex on the path of a site: array}, the first match counts. The array is
        [*stack, ...] with the stack axes of the sites that match, [...] for sites without a stack.
        A group in the regex, as in `r"layers/(\\d+)/"`, is an index of one more leading axis.
        A site without a match has no such side input.
    """

    values: dict[str, jax.Array]


def per_layer(values: Shaped[jax.Array, "layers *rest"]) -> PerSite:
    """A side input of which every site gets the part of its layer of the stack.

    Args:
      values: [layers, ...].

    Returns:
      A `PerSite` that all sites match.
    """
    return PerSite({"": values})


def side_inputs(
    ctx: Mapping[str, Dynamic], sites: Sequence[tuple[Site, Method]]
) -> tuple[dict[str, Dynamic], dict[str, Arrays]]:
    """The side inputs of a lifted call, those of all sites separate from those of each.

    Args:
      ctx: what the caller of the lifted function gave, by name.
      sites: the adapted sites, with their methods.

    Returns:
      (what is the same at every site by name, {path: {name: array [*stack, ...]} of that site}).

    Raises:
      ValueError: a pattern matches no site, an array lacks the stack axes of its site, or `ctx` has
        an
        "index" where a method reads the index of its slice.
    """
    common = {name: value for name, value in ctx.items() if not isinstance(value, PerSite)}
    side: dict[str, Arrays] = {}
    for name, value in ctx.items():
        for path, array in _assigned(name, value, sites) if isinstance(value, PerSite) else ():
            side.setdefault(path, {})[SIDE + name] = array
    for site, method in sites:
        if method.indexed:
            if "index" in ctx:
                raise ValueError(f"ctx['index']: {site.path} has the index of its slice there")
            index = jnp.arange(math.prod(site.stack), dtype=jnp.int32).reshape(site.stack)
            side.setdefault(site.path, {})[SIDE + "index"] = index
    return common, side


def _assigned(name: str, value: PerSite, sites: Sequence[tuple[Site, Method]]) -> Dynamic:
    """(path, array [*stack, ...]) for each site that a pattern matches."""
    paths, used = [site.path for site, _ in sites], set()
    for site, _ in sites:
        matches = ((p, re.search(p, site.path)) for p in value.values)
        pattern, match = next(((p, m) for p, m in matches if m), (None, None))
        if pattern is None or match is None:
            continue
        used.add(pattern)
        array, at = jnp.asarray(value.values[pattern]), tuple(int(g) for g in match.groups())
        inside = len(at) <= array.ndim and all(i < n for i, n in zip(at, array.shape, strict=False))
        if not inside or array.shape[len(at) : len(at) + len(site.stack)] != site.stack:
            raise ValueError(
                f"ctx[{name!r}] of {site.path}: got shape {array.shape}, expected leading axes "
                f"{site.stack}" + (f" after the index {at}" if at else "")
            )
        yield site.path, array[at]
    for pattern in value.values:
        if pattern not in used:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ValueError(f"ctx[{name!r}]: {pattern!r} is no adapted site; nearest: {near}")
