r"""Linked axes: the entries of several weights that stand for one unit and are pruned together.

=========  =====================================================================================
u          a unit: an attention head, a column of a feed-forward block; U of them per layer
outputs    leaves whose last axis the units write: kernels [*stack, d_in, d_out], biases [*stack, d]
inputs     kernels whose inputs are what the units wrote, [*stack, d_in, d_out]
block      neighbouring entries of an axis that belong to one unit
=========  =====================================================================================

A unit can be removed exactly where all of its entries go at once:

.. math::
    y = \sum_u f(x W^{up}_u + b_u) W^{down}_u, \qquad f(0) = 0

With grouped queries the unit is a head of the keys, and its block of the queries is the group of
query heads that read it: every axis has U blocks, each of its own size. Stack axes lead, so every
layer can keep other units.

Reference: groups of coupled structures: Zhang et al. 2023, arXiv:2305.18403 (LoRAPrune).
Deviates: the groups are declared by paths, not traced through the graph of a framework.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jlora.core.lift import flatten
from jlora.system import System
from jlora.types import Tree


class Axis(NamedTuple):
    """The part of one leaf that belongs to the units."""

    path: str  # of the leaf
    axis: int  # from its end: -1, or -2 for the inputs of a kernel
    block: int  # entries per unit


class Linked(NamedTuple):
    """Units of a model, and all the axes that they own. Hashable."""

    name: str  # of the kind of unit: "heads", "columns"
    units: int  # U, per layer
    stack: tuple[int, ...]  # sizes of the stack axes that all leaves have; () without layers
    axes: tuple[Axis, ...]


def linked(
    name: str, params: Tree, units: int, outputs: Sequence[str], inputs: Sequence[str]
) -> Linked:
    """Declares what belongs to some units.

    Args:
      name: of the kind of unit; a key of masks and scores.
      params: of the model, for the shapes; abstract ones suffice.
      units: U, per layer: heads of the keys, or columns of the feed-forward block.
      outputs: paths of leaves whose last axis the units write: query, key, value or up, gate, and
        their biases.
      inputs: paths of kernels that read the units: out or down.

    Returns:
      The declaration.

    Raises:
      ValueError: fewer than 2 units, a path that does not exist or comes twice, an axis that the
        units do not divide, leaves of different stacks, no inputs.
    """
    if units < 2:
        raise ValueError(f"{name}: units: got {units}, expected at least 2")
    if not outputs or not inputs:
        raise ValueError(f"{name}: got outputs {list(outputs)} and inputs {list(inputs)}, expected "
                         "at least one of each")  # fmt: skip
    leaves, axes, stacks = flatten(params)[0], [], {}
    for paths, axis in ((outputs, -1), (inputs, -2)):
        for path in paths:
            if path not in leaves:
                raise ValueError(f"{name}: {path}: got none, expected one of {sorted(leaves)}")
            shape = tuple(leaves[path].shape)
            if len(shape) < -axis or shape[axis] % units:
                raise ValueError(f"{name}: {path}: got shape {shape}, expected {units} equal "
                                 f"blocks on axis {axis}")  # fmt: skip
            axes.append(Axis(path, axis, shape[axis] // units))
            stacks[path] = shape
    if len(stacks) < len(axes):
        raise ValueError(f"{name}: got {[a.path for a in axes]}, expected every path once")
    kernel = stacks[inputs[0]]
    stack = kernel[:-2]
    for path, shape in stacks.items():
        if shape[: len(stack)] != stack or len(shape) - len(stack) not in (1, 2):
            raise ValueError(f"{name}: {path}: got shape {shape}, expected the stack {stack} of "
                             f"{inputs[0]} and one or two axes")  # fmt: skip
    return Linked(name, units, stack, tuple(axes))


def entries(mask: Shaped[Array, "*stack u"], axis: Axis) -> Shaped[Array, "*stack n"]:
    """What is said of units, said of the entries of one of their axes.

    Args:
      mask: one value per unit: whether it is kept, its score, ...
      axis: one of `Linked.axes`.

    Returns:
      One value per entry; n is U times the block.
    """
    return jnp.repeat(mask, axis.block, axis=-1)


def along(values: Shaped[Array, "*stack n"], axis: int, ndim: int) -> Shaped[Array, "*leaf"]:
    """Values of the entries of an axis in the form of a leaf, for products and `jnp.where`.

    Args:
      values: one per entry.
      axis: of the leaf, from its end.
      ndim: of the leaf.

    Returns:
      As many axes as the leaf, of size 1 where it has others.
    """
    lead = values.ndim - 1
    own = (values.shape[-1] if k == axis else 1 for k in range(lead - ndim, 0))
    return values.reshape(*values.shape[:-1], *own)


SYSTEM = System(
    name="Linked axes",
    paper="Zhang 2023, 2305.18403",
    symbol="linked",
    kind="component",
    evidence="blocks of heads and grouped queries; removing units is exact (tests of slicing)",
    tests=("tests/pruning/slicing_test.py",),
)
