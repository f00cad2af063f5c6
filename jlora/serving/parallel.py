r"""Tensor parallelism: a base over several devices, and adapters that send thin tensors only.

=====  ====================================================================================
D      devices along the mesh axis; j is one of them
T, o   components of a batch and their owners (`jlora.serving.components`), T / D on a device
=====  ====================================================================================

The base is split as usual: query, key, value, gate and up by columns, out and down by rows. At a
site split by columns a device has its columns of V and the first factors of T / D components,

.. math:: y_j = x W_j + \operatorname{all\,gather}\left([o_j = n] \odot x U_j\right) V_j

and at one that is split by rows, where x itself is split, its rows of U and the second factors of
T / D components,

.. math::
    y = \sum_j \left(x_j W_j + h_j V_j\right), \qquad
    h = [o = n] \odot \operatorname{reduce\,scatter}_j \left(x_j U_j\right)

so that the sum over devices is the base's own. What adapters add to the communication has T
numbers per token, whatever the width of the model, and nothing of an adapter is held twice; where
rows have components of their own (`jlora.serving.diagonal`), T numbers for all rows together. Keys
and values are split by heads, and with them the pages of the pool, which have heads first.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA), section on tensor parallelism.
Deviates: the paper splits the second factor of a row-split site by columns, after an all-reduce of
    the thin tensor; splitting it by components takes a reduce-scatter, half of that, and leaves the
    base's all-reduce as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jlora.core.adapter import Adapter
from jlora.core.lift import path_string
from jlora.core.site import Arrays
from jlora.models.decoder import DecoderConfig
from jlora.serving import diagonal
from jlora.serving.components import Components
from jlora.types import Dynamic, Tree

COLUMNS = ("query/kernel", "key/kernel", "value/kernel", "gate/kernel", "up/kernel")
ROWS = ("out/kernel", "down/kernel")
VOCABULARY = ("embed_tokens/embedding",)
LEAST = 16  # the smallest T (`jlora.serving.paged_pool`): a power of 2, as all others are


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where an engine lies."""

    mesh: Mesh  # with axes of type Auto; along other axes than `axis` everything is copied
    axis: str = "tensor"  # D devices

    def __post_init__(self):
        if self.axis not in self.mesh.axis_names:
            raise ValueError(f"axis: got {self.axis!r}, expected one of {self.mesh.axis_names}")
        if LEAST % self.devices:
            raise ValueError(f"{self.axis}: got {self.devices} devices, expected a divisor of "
                             f"{LEAST}, the least number of components")  # fmt: skip

    @property
    def devices(self) -> int:
        """D."""
        return self.mesh.shape[self.axis]

    def sharding(self, *entries: str | None) -> NamedSharding:
        """A sharding on the mesh.

        Args:
          entries: a mesh axis or None for each axis of an array.

        Returns:
          The sharding.
        """
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    def pages(self, data: Float[Array, "P W"]) -> Float[Array, "P W"]:
        """A pool whose pages are split by heads.

        Args:
          data: the pool.

        Returns:
          The same numbers.
        """
        return jax.lax.with_sharding_constraint(data, self.sharding(None, self.axis))


def over(devices: int) -> Layout:
    """A layout over the first devices there are.

    Args:
      devices: D.

    Returns:
      The layout.

    Raises:
      ValueError: there are fewer, or D does not divide 16.
    """
    known = jax.devices()
    if devices > len(known):
        raise ValueError(f"devices: got {devices}, expected at most {len(known)}, those there are")
    kind = (AxisType.Auto,)
    return Layout(jax.make_mesh((devices,), ("tensor",), axis_types=kind, devices=known[:devices]))


def place(layout: Layout, config: DecoderConfig, params: Tree) -> Tree:
    """The weights of a base on the mesh.

    Args:
      layout: the mesh.
      config: the architecture.
      params: its parameters, anywhere.

    Returns:
      The same numbers: projections split by columns or rows, the embedding by tokens of the
      vocabulary, the rest copied.

    Raises:
      ValueError: heads, or an axis that is to be split, that D does not divide.
    """
    if config.kv_heads % layout.devices:
        raise ValueError(f"kv_heads: got {config.kv_heads}, expected a multiple of "
                         f"{layout.devices}, the devices along {layout.axis!r}")  # fmt: skip

    def one(path: Dynamic, leaf: Array) -> Array:
        name, entries = path_string(path), list[str | None]([None] * leaf.ndim)
        cut = {"column": leaf.ndim - 1, "row": leaf.ndim - 2}.get(direction(name))
        cut = 0 if name.endswith(VOCABULARY) else cut
        if cut is not None:
            if leaf.shape[cut] % layout.devices:
                raise ValueError(f"{name}: got {leaf.shape}, expected a multiple of "
                                 f"{layout.devices} on axis {cut}")  # fmt: skip
            entries[cut] = layout.axis
        return jax.device_put(leaf, layout.sharding(*entries))

    return jax.tree_util.tree_map_with_path(one, params)


def direction(path: str) -> Literal["column", "row", ""]:
    """How the weight of a site is split.

    Args:
      path: of the site.

    Returns:
      "column", "row", or "" where every device has all of it.
    """
    if path.endswith(COLUMNS):
        return "column"
    return "row" if path.endswith(ROWS) else ""


def split(layout: Layout, bank: Adapter) -> Adapter:
    """The components of a batch on the mesh, T / D of them on a device.

    Args:
      layout: the mesh.
      bank: of `components.bank`, in a trace.

    Returns:
      A bank of the same numbers, whose sites send thin tensors only.
    """
    frozen: dict[str, Arrays] = {}
    for path, arrays in bank.frozen.items():
        frozen[path] = dict(arrays)
        for name, t in arrays.items():
            entries: list[str | None] = [None] * t.ndim
            if direction(path):  # u and v end in [T, d]: one of them is split by T, one by d
                by_component = (name == "u") == (direction(path) == "column")
                entries[-2 if by_component else -1] = layout.axis
            frozen[path][name] = jax.lax.with_sharding_constraint(t, layout.sharding(*entries))
    own = all(isinstance(method, Components) and method.own for _, method in bank.sites)
    sites = tuple((s, Split(own, layout=layout, way=direction(s.path))) for s, _ in bank.sites)
    return bank.replace(frozen=frozen, sites=sites)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(Components):
    """`Components` at a site whose weight is split; p is the same."""

    layout: Layout
    way: Literal["column", "row", ""]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        if not self.way or not isinstance(x, jax.Array):
            return super().apply(x, w, p, ctx)
        axis, lead = self.layout.axis, (None,) * (x.ndim - 1)
        whole, last = PartitionSpec(), PartitionSpec(*lead, axis)
        first, second = PartitionSpec(axis, None), PartitionSpec(None, axis)
        column = self.way == "column"
        products = (diagonal.inward, diagonal.outward) if self.own else (_inward, _outward)
        run = jax.shard_map(
            functools.partial(_column if column else _row, *products, axis=axis),
            mesh=self.layout.mesh,
            in_specs=(
                *((whole, second, first, second) if column else (last, first, second, first)),
                *(whole, whole),
            ),
            out_specs=last if column else whole,
        )
        u, v = p["u"].astype(x.dtype), p["v"].astype(x.dtype)
        return run(x, w.dense().astype(x.dtype), u, v, p["owner"], p["row"])


Product = Callable[[Array, Array, Array, Array], Array]  # of h or x, a factor, owner and row


def _column(
    inward: Product, outward: Product,
    x: Array, w: Array, u: Array, v: Array, owner: Array, row: Array, *, axis: str,
) -> Array:  # fmt: skip
    """One device of a column-split site: w [d_in, d_out / D], u [T / D, d_in], v [T, d_out / D]."""
    h = inward(x, u, _part(owner, len(u), axis), row)
    h = jax.lax.all_gather(h, axis, axis=h.ndim - 1, tiled=True)
    return x @ w + outward(h, v, owner, row)


def _row(
    inward: Product, outward: Product,
    x: Array, w: Array, u: Array, v: Array, owner: Array, row: Array, *, axis: str,
) -> Array:  # fmt: skip
    """One device of a row-split site: w [d_in / D, d_out], u [T, d_in / D], v [T / D, d_out]."""
    h = inward(x, u, owner, row)
    h = jax.lax.psum_scatter(h, axis, scatter_dimension=h.ndim - 1, tiled=True)
    return jax.lax.psum(x @ w + outward(h, v, _part(owner, len(v), axis), row), axis)


def _part(owner: Array, count: int, axis: str) -> Array:
    """The owners of the components that this device has; all devices know all owners."""
    return jax.lax.dynamic_slice_in_dim(owner, jax.lax.axis_index(axis) * count, count)


def _inward(x: Array, u: Array, owner: Array, row: Array) -> Array:
    return x @ u.T


def _outward(h: Array, v: Array, owner: Array, row: Array) -> Array:
    mine = (owner == row).reshape(*[1] * (h.ndim - 1), -1)
    return jnp.where(mine, h, jnp.zeros((), h.dtype)) @ v
