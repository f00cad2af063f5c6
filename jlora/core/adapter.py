"""An adapter: the parameters that methods keep for their sites, as a PyTree of its own.

``trainable`` and ``frozen`` are two trees of arrays, by the path of the site; with one more leading
axis on every array the same object is a bank of adapters, which `stack` makes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jlora.core.bank import Banked
from jlora.core.method import Method, rank_of, with_rank
from jlora.core.site import Arrays, Site
from jlora.types import Dynamic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Adapter(Banked):
    """The parameters of one adapter; with one more leading axis on every array, a bank of them."""

    trainable: dict[str, Arrays]  # path -> name -> array, leading stack axes
    frozen: dict[str, Arrays]  # the same for what is not trained (scales, bases, masks)
    sites: tuple[tuple[Site, Method], ...] = dataclasses.field(metadata={"static": True})

    def replace(self, **changes: Dynamic) -> "Adapter":
        """`dataclasses.replace`.

        Args:
          changes: fields and their new values.

        Returns:
          A new adapter.
        """
        return dataclasses.replace(self, **changes)

    def arrays(self, site: Site) -> tuple[Arrays, Arrays]:
        """The arrays of a site, trainable and frozen together.

        Args:
          site: one of `sites`.

        Returns:
          (its own [*stack, ...] by name, those that it shares with other sites); the latter have no
          stack
          axes, and are {} where nothing is shared.
        """
        own, shared = (
            {**self.frozen.get(key, {}), **self.trainable.get(key, {})}
            for key in (site.path, site.group)
        )
        return own, shared if site.group else {}  # "" is the path of parameters that are one array


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """A bank of adapters: every array gains a leading axis; smaller ranks are padded with zeros.

    Args:
      adapters: of the same sites and methods, which may differ in rank.

    Returns:
      An adapter with arrays [N, *stack, ...], whose methods have the largest rank of each site.

    Raises:
      ValueError: no adapters, or other sites, methods or shapes.
    """
    if not adapters:
        raise ValueError("stack: got no adapters, expected at least one")
    first = adapters[0]
    for k, other in enumerate(adapters):
        for (s0, m0), (s1, m1) in zip(first.sites, other.sites, strict=False):
            if s0 != s1 or type(m0) is not type(m1):
                raise ValueError(f"adapter {k}: got {s1.path} {m1}, expected {s0.path} {m0}")
        if len(first.sites) != len(other.sites):
            raise ValueError(
                f"adapter {k}: got {len(other.sites)}, expected {len(first.sites)} sites"
            )
    ranks = {}
    for i, (site, _) in enumerate(first.sites):
        same = [a.sites[i][1] for a in adapters]
        top = max(same, key=rank_of)
        if any(with_rank(m, rank_of(top)) != top for m in same):
            raise ValueError(f"{site.path}: methods differ in more than rank: {same}")
        ranks[site.path] = top
    return Adapter(
        _stack_part([a.trainable for a in adapters], ranks),
        _stack_part([a.frozen for a in adapters], ranks),
        tuple((site, ranks[site.path]) for site, _ in first.sites),
    )


def _stack_part(parts, methods):
    def pad(path, *leaves):
        where, name = path[0].key, path[1].key
        axes = methods[where].rank_axes if where in methods else {}
        if name in axes and len({t.shape for t in leaves}) > 1:
            top = max(t.shape[axes[name]] for t in leaves)
            leaves = [_pad(t, axes[name], top) for t in leaves]
        if len({t.shape for t in leaves}) > 1:
            raise ValueError(f"{where}/{name}: shapes differ: {[t.shape for t in leaves]}")
        return jnp.stack(leaves)

    return jax.tree_util.tree_map_with_path(pad, *parts)


def _pad(t: jax.Array, axis: int, size: int) -> jax.Array:
    width = [(0, 0)] * t.ndim
    width[axis] = (0, size - t.shape[axis])
    return jnp.pad(t, width)
