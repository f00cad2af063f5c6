"""Shardings of a decoder over a mesh of fsdp x tensor devices.

Tensor parallelism splits what a head or a hidden unit owns: outputs of query, key, value, gate and
up, inputs of out and down, the vocabulary. Fsdp splits the other axis of each matrix, and the rows
of a batch. Norms and biases are copies. Adapters follow their base (`jlora.specs`).

Reference: Shoeybi et al. 2019 (arXiv:1909.08053) for the tensor axis.
Deviates: XLA places the collectives from these shardings, where the paper writes them into the
model.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.core.lift import path_string

ROWS = PartitionSpec(None, "fsdp")  # of [parts, rows, length]
SPLIT = {  # end of a leaf's path -> axes of the matrix [in, out], or of the table [vocab, width]
    "embed_tokens/embedding": ("tensor", "fsdp"),
    "attention/query/kernel": ("fsdp", "tensor"),
    "attention/key/kernel": ("fsdp", "tensor"),
    "attention/value/kernel": ("fsdp", "tensor"),
    "attention/out/kernel": ("tensor", "fsdp"),
    "ffn/gate/kernel": ("fsdp", "tensor"),
    "ffn/up/kernel": ("fsdp", "tensor"),
    "ffn/down/kernel": ("tensor", "fsdp"),
    "lm_head/kernel": ("fsdp", "tensor"),
}


def mesh(fsdp: int, tensor: int) -> Mesh:
    """The first fsdp x tensor devices; with several processes, all devices of all of them.

    Raises:
      ValueError: there are fewer, or other processes would have none of them.
    """
    devices, processes = jax.devices(), jax.process_count()
    if processes > 1 and fsdp * tensor != len(devices):
        raise ValueError(
            f"fsdp x tensor: got {fsdp} x {tensor}, expected {len(devices)} together, the devices"
            f" of all {processes} processes"
        )
    if fsdp * tensor > len(devices):
        raise ValueError(
            f"fsdp x tensor: got {fsdp} x {tensor}, expected at most {len(devices)} devices"
        )
    return Mesh(np.array(devices[: fsdp * tensor]).reshape(fsdp, tensor), ("fsdp", "tensor"))


def place(tree: Any, where: Any) -> Any:
    """Arrays that every process has whole, as arrays that are divided among all devices.

    Args:
      tree: arrays, equal in all processes.
      where: the sharding of each, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)

    def one(t: Any, sharding: NamedSharding) -> Any:
        host = np.asarray(t)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(one, tree, where)


def gather(tree: Any, devices: Mesh) -> Any:
    """The same arrays, whole on every device, so that each process can read them.

    Args:
      tree: arrays on the mesh.
      devices: the mesh.
    """
    if jax.process_count() == 1:
        return tree
    copies = NamedSharding(devices, PartitionSpec())
    return jax.jit(lambda t: t, out_shardings=copies)(tree)


def specs(params: Any, devices: Mesh) -> Any:
    """One PartitionSpec per leaf of a decoder's parameters, for `jlora.specs` too.

    Args:
      params: dense parameters or their shapes.
      devices: the mesh.

    Raises:
      ValueError: an axis that its devices do not divide, with the path.
    """

    def one(path: Any, leaf: Any) -> PartitionSpec:
        name = path_string(path)
        axes_of_name = next((axes for end, axes in SPLIT.items() if name.endswith(end)), None)
        if axes_of_name is None:
            return PartitionSpec()
        spec = (None,) * (len(leaf.shape) - 2) + axes_of_name
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis and size % devices.shape[axis]:
                raise ValueError(
                    f"{axis}: {name} has an axis of {size}, expected a multiple of"
                    f" {devices.shape[axis]}"
                )
        return PartitionSpec(*spec)

    return jax.tree_util.tree_map_with_path(one, params)


def shardings(leaf_specs: Any, params: Any, devices: Mesh) -> Any:
    """The specs as shardings of `params`, whose leaves may be quantised since.

    Codes [..., n / block, block] and scales [..., n / block, 1] are split as [..., n], if the
    number of blocks can be.

    Args:
      leaf_specs: of `specs`.
      params: the parameters or their shapes.
      devices: the mesh.
    """

    def one(spec: PartitionSpec, part: Any) -> Any:
        def fits(leaf: Any) -> NamedSharding:
            kept = [
                axis if axis is None or size % devices.shape[axis] == 0 else None
                for size, axis in zip(leaf.shape, spec, strict=False)
            ]
            return NamedSharding(devices, PartitionSpec(*kept))

        return jax.tree.map(fits, part)

    return jax.tree.map(one, leaf_specs, params, is_leaf=lambda s: isinstance(s, PartitionSpec))
