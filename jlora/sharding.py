"""Shardings of an adapter from those of its base.

An array that has d_in or d_out as an axis takes over how the base is split along it, where that is
tensor parallelism; mesh axes that split weights only to save memory (fsdp) would cost a gather of a
small array for every use, so along them adapters are copies. Stack axes follow the base's, without
fsdp axes too.

Original to jlora (measured: an adapter that inherits the fsdp axis adds an all-gather and a
collective-permute a site).
Deviates: nothing.
"""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.core.adapter import Adapter
from jlora.core.lift import path_string
from jlora.core.method import Method
from jlora.core.site import Site
from jlora.types import Dynamic, Tree


def specs(
    adapter: Adapter,
    base_specs: Tree,
    mesh: Mesh,
    *,
    fsdp: Sequence[str] = ("fsdp", "data"),
    lead: Sequence[Dynamic] = (),
) -> Adapter:
    """Shardings of an adapter.

    Args:
      adapter: the adapter, or its shapes.
      base_specs: a tree like the parameters of PartitionSpecs or NamedShardings.
      mesh: the mesh of the shardings.
      fsdp: mesh axes along which adapters are replicated.
      lead: entries for axes before the stack axes, ("runs",) for a bank over that mesh axis.

    Returns:
      An Adapter of `NamedSharding`s, for `jax.device_put(adapter, specs)` or jit's shardings.

    Raises:
      ValueError: a site without a spec, a spec of another rank, a mesh axis that does not exist.
    """
    entries, _ = jax.tree_util.tree_flatten_with_path(
        base_specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    given = {path_string(path): getattr(s, "spec", s) for path, s in entries}
    chosen = {
        site.path: (site, method, _spec(site, given, mesh, fsdp)) for site, method in adapter.sites
    }

    def place(path, t):
        where, name = path[0].key, path[1].key
        shape = t.shape[len(lead) :]
        spec = _inherit(name, shape, *chosen[where]) if where in chosen else ()
        return NamedSharding(mesh, PartitionSpec(*lead, *spec))

    parts = (adapter.trainable, adapter.frozen)
    trainable, frozen = (jax.tree_util.tree_map_with_path(place, part) for part in parts)
    return adapter.replace(trainable=trainable, frozen=frozen)


def _spec(site: Site, given: dict[str, Dynamic], mesh: Mesh, fsdp: Sequence[str]) -> list[Dynamic]:
    """The base's spec, one entry per axis of the leaf, without fsdp axes."""
    if site.path not in given:
        raise ValueError(f"{site.path}: no spec among those of the base: {sorted(given)}")
    spec = list(given[site.path])
    if len(spec) > len(site.shape):
        raise ValueError(f"{site.path}: got the spec {spec} for the shape {site.shape}")
    out = []
    for entry in spec + [None] * (len(site.shape) - len(spec)):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        for name in names:
            if name not in mesh.axis_names:
                raise ValueError(f"{site.path}: got mesh axis {name!r}, not in {mesh.axis_names}")
        names = tuple(n for n in names if n not in fsdp)
        out.append(names[0] if len(names) == 1 else names or None)
    return out


def _inherit(
    name: str, shape: Dynamic, site: Site, method: Method, spec: list[Dynamic]
) -> list[Dynamic]:
    """one entry per axis of an array [*stack, ...]; what cannot be told apart is replicated."""

    def of(kind):
        return [s for s, k in zip(spec, site.kinds, strict=True) if k == kind]

    stack, own = of("s"), list(shape[len(site.stack) :])
    # an axis of the matrix that several axes of the leaf make up is split as its first one is
    entry = {k: of(k)[0] if of(k) and not any(of(k)[1:]) else None for k in "io"}
    rank = method.rank_axes.get(name)
    if len(own) == 2 and rank in (-1, -2):  # a factor: its side tells in from out
        kind, size = ("i", site.d_in) if rank == -1 else ("o", site.d_out)
        other = 0 if rank == -1 else 1
        out: list[Dynamic] = [None, None]
        out[other] = entry[kind] if own[other] == size else None
        return stack + out
    if site.d_in == site.d_out:
        return stack + [None] * len(own)
    sizes = {site.d_in: entry["i"], site.d_out: entry["o"]}
    out = [sizes.get(n) for n in own]
    seen: set[Dynamic] = set()
    return stack + [None if e in seen or seen.add(e) else e for e in out]
