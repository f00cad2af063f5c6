r"""Removing linked units: as zeros of equal shapes, or as smaller arrays; both are one function.

=========  =====================================================================================
m_u        which units are kept, bool [*stack, U] by the name of `linked_axes.Linked`
W, A, B    a kernel [*stack, d_in, d_out]; `a` [*stack, d_in, r] and `b` [*stack, r, d_out] of LoRA
=========  =====================================================================================

On an axis of outputs the mask multiplies the columns of W and B, on one of inputs the rows of W
and A, so that the delta of a unit goes with its weight:

.. math::
    W \leftarrow W \odot m, \qquad B \leftarrow B \odot m \;\;(\text{outputs}), \qquad
    A \leftarrow m^T \odot A \;\;(\text{inputs})

`masked` works under jit, with shapes that stay; `sliced` takes numbers and gives arrays without
the units. The sliced model has the outputs of the masked one wherever a unit of zeros adds nothing
(heads without values, activations with f(0) = 0).

Reference: Zhang et al. 2023, arXiv:2305.18403: masks while training, slices at the end.
Deviates: layers of one stack keep equally many units, since a stack has one width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.core.site import Arrays, Site
from jlora.pruning.linked_axes import Axis, Linked, along, entries
from jlora.system import System
from jlora.types import Dynamic, Tree

Kept = Mapping[str, Bool[Array, "*stack u"]]  # name of the units -> which of them are kept


def masked(params: Tree, groups: Sequence[Linked], kept: Kept) -> Tree:
    """Parameters with zeros in the place of removed units.

    Args:
      params: of the model.
      groups: the units.
      kept: which of them are kept; may be traced.

    Returns:
      A tree of the same shapes.

    Raises:
      ValueError: masks of other names or shapes, a leaf that is not a dense array.
    """
    return _changed(params, groups, kept, _zeroed)


def sliced(params: Tree, groups: Sequence[Linked], kept: Kept) -> Tree:
    """Parameters without the removed units.

    Args:
      params: of the model.
      groups: the units.
      kept: which of them are kept; numbers, not traced.

    Returns:
      A tree of smaller leaves.

    Raises:
      ValueError: as `masked`; layers of a stack that keep different numbers, or no unit.
    """
    _check_even(groups, kept)
    return _changed(params, groups, kept, _taken)


def masked_adapter(adapter: Adapter, groups: Sequence[Linked], kept: Kept) -> Adapter:
    """An adapter whose delta is zero on removed units.

    Args:
      adapter: of LoRA, or a method with its `a` and `b`, at sites of any of the leaves.
      groups: the units.
      kept: which of them are kept; may be traced.

    Returns:
      An adapter of the same shapes.

    Raises:
      ValueError: masks of other names or shapes, a site of another method.
    """
    return changed_adapter(adapter, groups, kept, _zeroed)


def sliced_adapter(adapter: Adapter, groups: Sequence[Linked], kept: Kept) -> Adapter:
    """The adapter of the sliced model.

    Args:
      adapter: as of `masked_adapter`.
      groups: the units.
      kept: which of them are kept; numbers.

    Returns:
      An adapter of smaller factors, whose sites have the shapes of `sliced`.

    Raises:
      ValueError: as `sliced` and `masked_adapter`.
    """
    _check_even(groups, kept)
    small = changed_adapter(adapter, groups, kept, _taken)
    sizes = {(x.path, x.axis): int(np.asarray(kept[g.name]).sum(-1).flat[0]) * x.block
             for g in groups for x in g.axes}  # fmt: skip
    return small.replace(
        sites=tuple((resized(site, sizes), method) for site, method in adapter.sites)
    )


def resized(site: Site, sizes: Mapping[tuple[str, int], int]) -> Site:
    """A site of a leaf whose axes have other sizes.

    Args:
      site: of the leaf as it was.
      sizes: (path, axis from the end) -> new size.

    Returns:
      The site; others as they are.
    """
    shape = list(site.shape)
    for axis in (-1, -2):
        shape[axis] = sizes.get((site.path, axis), shape[axis])
    return dataclasses.replace(site, shape=tuple(shape))


def changed_adapter(
    adapter: Adapter,
    groups: Sequence[Linked],
    kept: Kept,
    change: Callable[[Dynamic, Dynamic, Axis, int], Dynamic],
) -> Adapter:
    """The adapter with a change of the factor that each linked axis of a site belongs to.

    Args:
      adapter: of methods with `a` and `b`.
      groups: the units.
      kept: which of them are kept.
      change: (factor, mask of units, axis of the leaf, axis of the factor) -> factor.

    Returns:
      The adapter.

    Raises:
      ValueError: masks of other names or shapes, a site of another method or layout.
    """
    check_kept(groups, kept)
    trees = [dict(adapter.trainable), dict(adapter.frozen)]
    rows = {site.path: (site, method) for site, method in adapter.sites}
    for group in groups:
        for axis in group.axes:
            if axis.path not in rows:
                continue
            site, method = rows[axis.path]
            name = _factor(site, axis)
            place = -1 if name == "b" else -2
            for tree in trees:
                own: Arrays = tree[axis.path]
                if name in own:
                    tree[axis.path] = {
                        **own,
                        name: change(own[name], kept[group.name], axis, place),
                    }
                    break
            else:
                raise ValueError(f"{axis.path}: got {method}, expected a method with a and b, LoRA")
    return adapter.replace(trainable=trees[0], frozen=trees[1])


def check_kept(groups: Sequence[Linked], kept: Kept) -> None:
    """Checks that masks fit to units.

    Args:
      groups: the units.
      kept: masks.

    Raises:
      ValueError: names or shapes that differ.
    """
    names = sorted(g.name for g in groups)
    if names != sorted(kept):
        raise ValueError(f"kept: got {sorted(kept)}, expected {names}")
    for g in groups:
        want = (*g.stack, g.units)
        if kept[g.name].shape != want or kept[g.name].dtype != bool:
            got = f"{kept[g.name].dtype}{kept[g.name].shape}"
            raise ValueError(f"kept: {g.name}: got {got}, expected bool{want}")


def indices(mask: Dynamic, block: int) -> np.ndarray:
    """Numbers of the kept entries of an axis.

    Args:
      mask: bool [*stack, U], equally many per layer; numbers.
      block: entries per unit.

    Returns:
      int32 [*stack, n], ascending.
    """
    whole = np.repeat(np.asarray(mask), block, axis=-1)
    width = int(whole.sum(-1).flat[0])
    return np.argsort(~whole, axis=-1, kind="stable")[..., :width].astype(np.int32)


def _factor(site: Site, axis: Axis) -> str:
    """Which factor of LoRA has the axis of a leaf."""
    if site.kinds.strip("s") != "io" or site.kinds.lstrip("s") != "io":
        raise ValueError(f"{site.path}: got the layout {site.kinds!r}, expected [*stack, in, out]")
    return "b" if axis.axis == -1 else "a"


def _changed(params: Tree, groups: Sequence[Linked], kept: Kept, change: Dynamic) -> Tree:
    check_kept(groups, kept)
    leaves, tree = flatten(params)
    for group in groups:
        for axis in group.axes:
            leaf = leaves.get(axis.path)
            if not hasattr(leaf, "ndim") or hasattr(leaf, "dequantize"):
                got = "none" if leaf is None else type(leaf).__name__
                raise ValueError(f"{axis.path}: got {got}, expected an array; quantise afterwards")
            leaves[axis.path] = change(leaf, kept[group.name], axis, axis.axis)
    return jax.tree.unflatten(tree, list(leaves.values()))


def _zeroed(leaf: Array, mask: Array, axis: Axis, place: int) -> Array:
    whole = along(entries(mask, axis), place, leaf.ndim)
    return jnp.where(whole, leaf, jnp.zeros_like(leaf))


def _taken(leaf: Array, mask: Array, axis: Axis, place: int) -> Array:
    index = jnp.asarray(indices(mask, axis.block))
    return jnp.take_along_axis(leaf, along(index, place, leaf.ndim), axis=place)


def _check_even(groups: Sequence[Linked], kept: Kept) -> None:
    check_kept(groups, kept)
    for g in groups:
        counts = sorted(set(np.asarray(kept[g.name]).sum(-1).flat))
        if len(counts) > 1 or counts[0] == 0:
            raise ValueError(f"kept: {g.name}: got {[int(c) for c in counts]} units per layer, "
                             "expected one number above 0")  # fmt: skip


SYSTEM = System(
    name="Slicing of linked units",
    paper="Zhang 2023, 2305.18403",
    symbol="sliced",
    kind="component",
    evidence="sliced equals masked equals numpy, with adapters; a mask of one side only is seen",
)
