r"""LoRAM: LoRA is trained on a pruned model and used on the full one.

===========  ==================================================================================
W, W^P       a kernel of the full model, and what pruning left of it
k_in, k_out  numbers of the inputs and outputs that are kept, of units (`linked_axes`)
A^P, B^P     factors that were trained on W^P, [k_in, r] and [r, k_out]
R            recovery: rows and columns go back to their places, others stay zero
===========  ==================================================================================

.. math::
    y^P = x W^P + s\, x A^P B^P \quad (\text{training}), \qquad
    R(A)_{k_{in}} = A^P, \; R(B)_{:,k_{out}} = B^P, \qquad
    y = x W + s\, x R(A) R(B) \quad (\text{inference})

So training holds the small model and inference loses no knowledge. *Structured* pruning slices
units, by chance with `drawn` or by any score (`jlora.pruning.loraprune`). *Unstructured* pruning
keeps the shapes and zeros single entries (`zeroed`); recovery is then the identity. The quantised
form trains on ``jl.quantize`` of the sliced kernels: recovery is of the factors alone.

Reference: Zhang et al. 2025, arXiv:2502.13533; official code for the places of rows and columns.
Deviates: aligning the pruned model with further pre-training is left to the caller, for it is
ordinary training of W^P. Rows of A that recovery adds are zero; the official option of normal ones
has the same delta on kept outputs, and another one only on inputs that were never trained.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.pruning.linked_axes import Axis, Linked, along
from jlora.pruning.slicing import Kept, changed_adapter, indices, resized
from jlora.system import System
from jlora.types import Tree


def drawn(
    key: Key[Array, ""], groups: Sequence[Linked], ratio: float = 0.5
) -> dict[str, Bool[Array, "*stack u"]]:
    """Masks by chance: the paper's random structured pruning.

    Args:
      key: of the draw; every layer and kind of unit has its own.
      groups: the units.
      ratio: share of the units of a layer that go, in [0, 1); 0.5 unless the memory says otherwise.

    Returns:
      By the name of the units; at least one is kept.

    Raises:
      ValueError: a ratio outside of [0, 1).
    """
    _check(ratio)
    keys = jax.random.split(key, len(groups))
    return {
        g.name: by_score(jax.random.uniform(k, (*g.stack, g.units)), ratio)
        for g, k in zip(groups, keys, strict=True)
    }


def by_score(score: Float[Array, "*stack u"], ratio: float = 0.5) -> Bool[Array, "*stack u"]:
    """Masks that keep the units of the largest scores in each layer.

    Args:
      score: of the units: importance, norm, ...
      ratio: share of the units of a layer that go, in [0, 1).

    Returns:
      Which of them are kept; of equal scores the first ones go.

    Raises:
      ValueError: a ratio outside of [0, 1).
    """
    _check(ratio)
    gone = math.floor(ratio * score.shape[-1] + 1e-6)
    return jnp.argsort(jnp.argsort(score, axis=-1), axis=-1) >= gone


def magnitudes(params: Tree, groups: Sequence[Linked]) -> dict[str, Float[Array, "*stack u"]]:
    """Squared Frobenius norm of every unit over all of its entries, for `by_score`.

    Args:
      params: of the model.
      groups: the units.

    Returns:
      By the name of the units, float32.
    """
    leaves, out = flatten(params)[0], {}
    for g in groups:
        total = jnp.zeros((*g.stack, g.units), jnp.float32)
        for x in g.axes:
            square = jnp.moveaxis(jnp.square(leaves[x.path].astype(jnp.float32)), x.axis, -1)
            total += square.reshape(*g.stack, -1, g.units, x.block).sum((-3, -1))
        out[g.name] = total
    return out


def zeroed(params: Tree, paths: Sequence[str], ratio: float = 0.5) -> Tree:
    """Unstructured pruning: the smallest entries of each kernel are zero.

    Args:
      params: of the model.
      paths: of the kernels.
      ratio: share of the entries of a kernel that go, in [0, 1).

    Returns:
      A tree of the same shapes.

    Raises:
      ValueError: a ratio outside of [0, 1), a path that does not exist.
    """
    _check(ratio)
    leaves, tree = flatten(params)
    for path in paths:
        if path not in leaves:
            raise ValueError(f"{path}: got none, expected one of {sorted(leaves)}")
        w = leaves[path]
        flat = jnp.abs(w).reshape(*w.shape[:-2], -1)
        leaves[path] = jnp.where(by_score(flat, ratio).reshape(w.shape), w, jnp.zeros_like(w))
    return jax.tree.unflatten(tree, list(leaves.values()))


def recovered(adapter: Adapter, groups: Sequence[Linked], kept: Kept) -> Adapter:
    """R: the adapter of the full model.

    Args:
      adapter: LoRA that was trained on `jlora.pruning.slicing.sliced` parameters.
      groups: the units of the full model.
      kept: which of them the pruned model has; numbers.

    Returns:
      An adapter of the full sites; its delta is that of the small one on kept units, and zero
      elsewhere.

    Raises:
      ValueError: masks of other names or shapes, factors of another size than the masks keep.
    """

    def back(small: Array, mask: Array, axis: Axis, place: int) -> Array:
        index = indices(mask, axis.block)
        if small.shape[place] != index.shape[-1]:
            raise ValueError(f"{axis.path}: got a factor with {small.shape[place]} entries, "
                             f"expected the {index.shape[-1]} that are kept")  # fmt: skip
        shape = list(small.shape)
        shape[place] = mask.shape[-1] * axis.block
        whole = jnp.broadcast_to(along(jnp.asarray(index), place, small.ndim), small.shape)
        zero = jnp.zeros(shape, small.dtype)
        return jnp.put_along_axis(zero, whole, small, axis=place, inplace=False)

    full = changed_adapter(adapter, groups, kept, back)
    sizes = {(x.path, x.axis): g.units * x.block for g in groups for x in g.axes}
    return full.replace(
        sites=tuple((resized(site, sizes), method) for site, method in adapter.sites)
    )


def _check(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: got {ratio}, expected in [0, 1)")


SYSTEM = System(
    name="LoRAM",
    paper="Zhang 2025, 2502.13533",
    symbol="recovered",
    evidence="deltas on kept and removed units by numpy; recovered and sliced again is the same",
    rows=(42,),
    claim="loram",
)
