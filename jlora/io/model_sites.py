"""The sites of the model that a file is read for: given as a table, or read off its parameters.

A table (`jl.sites`, a list of sites, the sites of an adapter) says which axis of a weight is in and
which is out. Parameters do not: [16, 8] is what Flax calls the kernel of 16 inputs and torch the
weight of 8. Of a weight that is not square the file's own shapes show a mistake; a square one
would be read transposed without an error, so its layout has to be given.

Paths are those of `jlora.core.lift.path_string`, for parameters of any kind: dicts, lists, named
tuples, registered dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlora.core.lift import flatten
from jlora.core.site import Site, fold
from jlora.core.site_table import Sites
from jlora.io.names import NameMap
from jlora.io.slices import required
from jlora.types import Dynamic, Tree

LAYOUTS = {"in_out": "io", "out_in": "oi"}


@dataclasses.dataclass(frozen=True)
class ModelSites:
    """What a reader knows of the model."""

    sites: Mapping[str, Site]  # by path
    biases: Collection[str] | None = None  # paths of sites with a bias next to them; None: unknown
    inferred: Collection[str] = ()  # paths whose site was read off a leaf
    undecided: Collection[str] = ()  # of these, square matrices without a layout
    weights: Mapping[str, Dynamic] | None = None  # the leaves by path; None: sites were given

    def site(self, path: str) -> Site:
        """The site at a path.

        Args:
          path: of the weight.

        Returns:
          The site.

        Raises:
          ValueError: it is square, and nothing says which of its axes is the input.
        """
        if path in self.undecided:
            raise ValueError(
                f"{path}: shape {self.sites[path].shape} is square, so parameters alone do not say "
                "whether it is [in, out] or [out, in]; pass jl.sites(fn, params, ...) instead of "
                "the parameters, or layout='in_out' (Flax kernels) or layout='out_in' (torch)"
            )
        return self.sites[path]

    def matrix(self, path: str, index: tuple[int, ...]) -> Float[np.ndarray, "d_in d_out"]:
        """One slice of a weight.

        Args:
          path: of the weight.
          index: on its stack axes.

        Returns:
          [d_in, d_out].

        Raises:
          ValueError: sites were given, or the leaf is not an array.
        """
        leaf = (self.weights or {}).get(path)
        if leaf is None or isinstance(leaf, Site | jax.ShapeDtypeStruct):
            raise ValueError(f"{path}: the file is relative to the base weight; pass params")
        return np.asarray(fold(jnp.asarray(leaf), self.site(path).kinds)[index])

    def with_tables(self, paths: Collection[str]) -> ModelSites:
        """The same, where some leaves are embedding tables [*stack, rows, d_out].

        Torch and Flax keep tables alike, so that their layout is known.

        Args:
          paths: of the tables.

        Returns:
          Their sites changed, none of them undecided.
        """
        changed = {
            path: dataclasses.replace(site, kinds="s" * len(site.stack) + "io", ops=("gather",))
            for path, site in self.sites.items()
            if path in paths and path in self.inferred and "gather" not in site.ops
        }
        undecided = frozenset(self.undecided) - changed.keys()
        return dataclasses.replace(self, sites={**self.sites, **changed}, undecided=undecided)


def model_sites(params_or_sites: Tree, names: NameMap, layout: str | None = None) -> ModelSites:
    """The sites of a model.

    Args:
      params_or_sites: a table of sites, or parameters. Leaves of the latter may be sites, too.
      names: its rules say which leaves are weights, and how many stack axes they have.
      layout: of the matrices among the parameters, "in_out" or "out_in"; None: not said.

    Returns:
      The sites by path, and what is known of their layout and biases.

    Raises:
      ValueError: `names` is no name map; another `layout`, or one for a table of sites, which has
        its own; a leaf that a rule names and that is not a matrix, a vector or a stack of these.
    """
    required(names)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {sorted(LAYOUTS)} or None")
    table = _table(params_or_sites)
    if table is not None:
        if layout is not None:
            raise ValueError(
                f"layout: got {layout!r} for sites, which say their own; expected None"
            )
        biases = biased(table) if isinstance(params_or_sites, Sites) else None
        return ModelSites({path: names.site(site) for path, site in table.items()}, biases)
    leaves, _ = flatten(params_or_sites)
    sites, inferred, undecided = {}, set(), set()
    for path, leaf in leaves.items():
        if isinstance(leaf, Site):
            sites[path] = names.site(leaf)
            continue
        site = _inferred(path, leaf, names, layout)
        if site is None:
            continue
        sites[path] = names.site(site)
        inferred.add(path)
        square = site.kinds.endswith(("io", "oi")) and site.shape[-1] == site.shape[-2]
        said = layout is not None or names.kinds(path) is not None
        if square and not said and "gather" not in site.ops:
            undecided.add(path)
    known = (frozenset(inferred), frozenset(undecided))
    return ModelSites(sites, biased(leaves), *known, weights=leaves)


def _table(given: Dynamic) -> dict[str, Site] | None:
    """Path -> site, if a table of sites is given."""
    if isinstance(given, Iterator):
        given = list(given)
    if isinstance(given, Sites | list | tuple):
        items = [i[0] if isinstance(i, tuple) and len(i) == 2 else i for i in given]
        sites = {site.path: site for site in items if isinstance(site, Site)}
        if all(isinstance(item, Site) for item in items):
            return sites
    return None


def biased(paths: Collection[str]) -> set[str]:
    """Those of the paths that have a leaf called ``bias`` next to them.

    >>> biased(["q/kernel", "q/bias", "k/kernel"]) == {"q/kernel", "q/bias"}
    True

    Args:
      paths: of all leaves; ``/value`` of NNX does not count as a name.

    Returns:
      A part of them.
    """
    plain = {path: path.removesuffix("/value") for path in paths}
    known = set(plain.values())
    return {path for path, name in plain.items() if _join(name.rpartition("/")[0], "bias") in known}


def _join(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def _inferred(path: str, leaf: Dynamic, names: NameMap, layout: str | None) -> Site | None:
    """The site of a leaf by the rule for its path, None where there is no rule."""
    stack = names.stack_axes(path)
    if stack is None:
        return None
    shape = getattr(leaf, "shape", None)
    if shape is None:
        raise ValueError(f"{path}: got a {type(leaf).__name__}, expected an array: a rule names it")
    shape = tuple(shape)
    kinds = names.kinds(path)
    if kinds is not None:
        if len(kinds) != len(shape):
            raise ValueError(f"{path}: got shape {shape}, expected axes {kinds!r} by the name map")
        ops = ("gather",) if _is_table(path) else ("dot",) if "i" in kinds else ()
        return Site(path, shape, kinds, leaf.dtype, ops)
    if names.is_parameter(path) and len(shape) == stack + 1:
        return Site(path, shape, "s" * stack + "o", leaf.dtype)
    experts = names.is_parameter(path) and len(shape) == stack + 3
    if len(shape) != stack + experts + 2:
        raise ValueError(
            f"{path}: shape {shape} is not [{stack} stack axes, in, out]; pass sites "
            "from jl.sites instead of parameters, or give the name map's rule its kinds"
        )
    table = _is_table(path)
    kinds = "io" if table else LAYOUTS[layout or "in_out"]
    ops = ("gather",) if table else ("dot",)
    return Site(path, shape, "s" * (stack + experts) + kinds, leaf.dtype, ops)


def _is_table(path: str) -> bool:
    return path.removesuffix("/value").rpartition("/")[2] == "embedding"
