r"""What schedules of ranks share: masked arrays, masked updates, smaller arrays between phases.

=========  =====================================================================================
m          masks, path of a site -> bool [*stack, R]: which of its ranks are kept
t          an array with an axis of ranks (`Method.rank_axes`): `a` [*stack, d_in, R], ...
=========  =====================================================================================

Within a phase shapes stay, so nothing compiles twice: dropped ranks are zeros of one array, and
updates are masked, not gradients, since moments and weight decay go on moving an array whose
gradient is zero. Between phases `shrink` gives smaller arrays and the moments that belong to them.

A stack of layers has one width: that of the layer with most ranks; the others are padded with
zeros. A site that keeps no rank at all leaves the adapter.

Reference: none; what Zhang et al. 2023, arXiv:2303.10512, and its successors need in JAX.
"""

import dataclasses
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool

from jlora.core.adapter import Adapter
from jlora.core.method import Method, rank_of, with_rank
from jlora.core.site import Arrays, Site
from jlora.types import Dynamic, Tree

Masks = Mapping[str, Bool[jax.Array, "*stack r"]]


def full(adapter: Adapter) -> dict[str, jax.Array]:
    """Masks that keep every rank.

    Args:
      adapter: of methods that have ranks.

    Returns:
      {path: [*stack, R] bool}, all True.

    Raises:
      ValueError: a site without an array that has an axis of ranks.
    """
    out = {}
    for site, method in adapter.sites:
        own = {**adapter.frozen[site.path], **adapter.trainable[site.path]}
        sizes = {own[n].shape[axis] for n, axis in method.rank_axes.items() if n in own}
        if len(sizes) != 1:
            raise ValueError(f"{site.path}: got {method}, expected a method with ranks")
        out[site.path] = jnp.ones((*site.stack, *sizes), bool)
    return out


def kept(masks: Masks) -> jax.Array:
    """How many ranks masks keep.

    Args:
      masks: of all sites.

    Returns:
      int32 [], over sites and layers.
    """
    return sum((jnp.sum(m, dtype=jnp.int32) for m in masks.values()), jnp.zeros((), jnp.int32))


def along(mask: Bool[jax.Array, "*stack r"], t: Dynamic, axis: int) -> jax.Array:
    """A mask in the form of an array, for `jnp.where`.

    Args:
      mask: of the ranks of a site.
      t: an array of it, [*stack, ...].
      axis: of the ranks of t, from its end.

    Returns:
      The mask with as many axes as t, of size 1 where t has no ranks.
    """
    own = range(mask.ndim - 1 - t.ndim, 0)
    return mask.reshape(*mask.shape[:-1], *(mask.shape[-1] if k == axis else 1 for k in own))


def zeroed(adapter: Adapter, masks: Masks, names: Collection[str] = ("b",)) -> Adapter:
    """The adapter with zeros in the place of dropped ranks.

    Args:
      adapter: any.
      masks: which ranks are kept; may be traced.
      names: of the arrays that become zero. One factor is enough: the delta has lost the rank, and
        the other factor, which stays, gives that one a gradient, so that the rank can come back.

    Returns:
      An adapter of the same shapes.
    """
    out = dict(adapter.trainable)
    for site, method in adapter.sites:
        out[site.path] = {
            n: jnp.where(along(masks[site.path], t, method.rank_axes[n]), t, jnp.zeros_like(t))
            if n in names else t
            for n, t in adapter.trainable[site.path].items()
        }  # fmt: skip
    return adapter.replace(trainable=out)


def masked_updates(
    sites: tuple[tuple[Site, Method], ...],
) -> optax.GradientTransformationExtraArgs:
    """Updates of zero for dropped ranks; to be chained last.

    ``optax.chain(optax.adamw(1e-3), masked_updates(adapter.sites))``, whose `update` is called with
    ``masks=masks``.

    Args:
      sites: `Adapter.sites`.

    Returns:
      A stateless transformation of trees like `Adapter.trainable`.
    """
    axes = {site.path: method.rank_axes for site, method in sites}

    def update(
        updates: Tree, state: Tree, params: Tree = None, *, masks: Masks, **_: Dynamic
    ) -> tuple[Tree, Tree]:
        del params
        return {
            path: {
                n: jnp.where(along(masks[path], u, axes[path][n]), u, jnp.zeros_like(u))
                if path in axes and n in axes[path] else u
                for n, u in own.items()
            }
            for path, own in updates.items()  # type: ignore[union-attr]
        }, state  # fmt: skip

    init = lambda params: optax.EmptyState()  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def shrink(adapter: Adapter, state: Tree, masks: Masks) -> tuple[Adapter, Dynamic]:
    """The adapter and the optimizer's state with the kept ranks alone.

    Args:
      adapter: as `zeroed` leaves it, or before that.
      state: of an optax optimizer of its trainable: every tree of that structure is cut alike.
      masks: which ranks are kept; numbers, not traced.

    Returns:
      Both, smaller. The scale of a site stays, so its learning rate keeps its meaning: alpha moves
      with the rank. Sites that keep nothing are gone; of a stack, ranks that another layer keeps
      are zero.
    """
    number = {p: np.asarray(m) for p, m in masks.items()}
    live = {p for p, m in number.items() if m.any()}
    order = {p: _order(number[p]) for p in live}
    axes = {site.path: method.rank_axes for site, method in adapter.sites}
    gone = axes.keys() - live

    def cut(tree: dict[str, Arrays]) -> dict[str, Arrays]:
        return {
            p: {n: _take(t, *order[p], axes[p][n]) if p in live and n in axes[p] else t
                for n, t in own.items()}
            for p, own in tree.items() if p not in gone
        }  # fmt: skip

    rows = tuple(
        (site, _at_rank(method, order[site.path][0].shape[-1]))
        for site, method in adapter.sites if site.path in live
    )  # fmt: skip
    small = Adapter(cut(adapter.trainable), cut(adapter.frozen), rows)
    form = jax.tree.structure(adapter.trainable)

    def walk(node: Dynamic) -> Dynamic:
        if isinstance(node, dict) and jax.tree.structure(node) == form:
            return cut(node)
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*(walk(t) for t in node))
        return type(node)(walk(t) for t in node) if isinstance(node, tuple | list) else node

    return small, walk(state)


def _order(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices [*stack, width] of kept ranks, in their order, and which of them are kept."""
    width = int(mask.sum(-1).max())
    index = np.argsort(~mask, axis=-1, kind="stable")[..., :width]
    return index, np.take_along_axis(mask, index, -1)


def _take(t: jax.Array, index: np.ndarray, live: np.ndarray, axis: int) -> jax.Array:
    taken = jnp.take_along_axis(t, along(jnp.asarray(index), t, axis), axis)
    return jnp.where(along(jnp.asarray(live), taken, axis), taken, jnp.zeros_like(taken))


def _at_rank(method: Method, rank: int) -> Method:
    """The method at another rank, with the alpha that gives the same scale."""
    if hasattr(method, "alpha"):
        share = rank / rank_of(method)
        share = share**0.5 if getattr(method, "rslora", False) else share
        method = dataclasses.replace(method, alpha=method.alpha * share)  # type: ignore[attr-defined]
    return with_rank(method, rank)
