"""LoRA leaves of JAX packages in files: a parameter tree in, the leaves alone out.

A tree is an Orbax checkpoint (as Tunix, gemma, MaxText and Flax programs save one), or a
safetensors file whose keys are paths. See `jlora.io.lora_leaves` for what the leaves are.

Deviates: nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora import io
from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.lora_leaves import QWIX, is_leaf


def is_tree(folder: Path) -> bool:
    """Whether a directory is a checkpoint of something else than an adapter of ours.

    Args:
      folder: a directory.

    Returns:
      True for what Orbax writes of a tree; adapters have a folder for their description.
    """
    return (folder / "_METADATA").is_file() and not (folder / "meta").is_dir()


def read(
    path: Path,
    names: NameMap,
    alpha: float | None,
    shapes: Mapping[str, jax.ShapeDtypeStruct] = MappingProxyType({}),
) -> Adapter:
    """The adapter in the LoRA leaves of a tree.

    Args:
      path: an Orbax checkpoint, or a safetensors file.
      names: the name map of the package.
      alpha: of qwix's rule; None for other packages, and for files of `write`, which have it.
      shapes: of the model's weights by path, which a file of flattened LoRA leaves alone lacks
        (MaxText's); {}: the tree has the weights, or they are not needed.

    Returns:
      The adapter.

    Raises:
      FormatError: what `load_lora_leaves` refuses, with the path.
    """
    arrays, said = _arrays(path)
    if alpha is None and said.get("package") in QWIX:
        alpha = float(said["alpha"])
    base = {name: shape for name, shape in shapes.items() if not is_leaf(name)}
    try:
        return io.load_lora_leaves(base | arrays, names, alpha=alpha)
    except ValueError as error:
        raise FormatError(path, str(error)) from error


def write(path: Path, adapter: Adapter, package: str) -> None:
    """Writes the leaves of a package, ``{path: array}``, as a safetensors file.

    Args:
      path: the file.
      adapter: the adapter.
      package: "qwix", "maxtext", "gemma", "flax", "easydel" or "keras"; with rank and alpha in
        the metadata of the file.

    Raises:
      FormatError: what `lora_leaves` refuses, with the path.
    """
    try:
        leaves = io.lora_leaves(adapter, package)
    except ValueError as error:
        raise FormatError(path, str(error)) from error
    said = {"package": package, "rank": str(leaves.rank), "alpha": str(leaves.alpha)}
    safetensors_file.write(path, leaves.leaves, said)


def _arrays(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """(arrays by path, the metadata of a safetensors file)."""
    if path.is_file():
        return safetensors_file.read(path)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(path.absolute())
        return {name: np.asarray(leaf) for name, leaf in flatten(tree)[0].items()}, {}
    except Exception as error:  # Orbax raises whatever its layers do
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(path, f"no Orbax checkpoint of a tree: {first[:200]}") from error
