"""What every reader of a Hugging Face directory needs: its config and its tensors, checked.

Errors: ``ValueError`` with path, name, got and expected for a field that is missing or not
implemented; for tensors that are missing, surplus, there twice, misshapen, of another dtype than
float32, float16 and bfloat16, or not finite.

Reference: published checkpoints.
Deviates: no.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped
from safetensors import safe_open

from jlora.io import safetensors_file
from jlora.io.inside import inside
from jlora.io.json_file import read_json
from jlora.models.encoder_config import Params
from jlora.types import Dynamic, Json

T = TypeVar("T")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 64 << 20  # bytes
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def read_config(
    directory: str | Path, kind: Callable[..., T], fields: Mapping[str, str],
    fixed: Mapping[str, Json], optional: Collection[str],
) -> T:  # fmt: skip
    """``config.json`` of a directory as a configuration.

    Args:
      directory: of the checkpoint.
      kind: makes the configuration, from keyword arguments.
      fields: of `kind` -> of the file.
      fixed: fields of the file that change the function and have one implemented value; where one
        is
        absent, it has that value.
      optional: fields of `kind` that the file need not have.

    Returns:
      What `kind` returns.

    Raises:
      ValueError: a field is missing, or has a value that is not implemented.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    for field, expected in fixed.items():
        if (got := raw.get(field, expected)) != expected:
            raise ValueError(f"{path}: {field}: got {got!r}, expected {expected!r}")
    required = [name for ours, name in fields.items() if ours not in optional]
    if missing := [name for name in required if name not in raw]:
        raise ValueError(f"{path}: missing fields {missing}")
    return kind(**{ours: raw[name] for ours, name in fields.items() if name in raw})


def shards(directory: str | Path) -> list[Path]:
    """The files that hold a checkpoint's weights: one, or those that its index names.

    Args:
      directory: of the checkpoint.

    Returns:
      Their paths, sorted.

    Raises:
      ValueError: the index is no index, or names a file outside `directory`.
    """
    single, index = (Path(directory) / name for name in (SINGLE, INDEX))
    if single.exists() or not index.exists():
        return [single]
    raw = safetensors_file.parse_json(index, safetensors_file.read_bytes(index, MAX_INDEX))
    names = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map: got {type(names).__name__}, expected an object")
    return [inside(directory, name, index) for name in sorted({*map(str, names.values())})]


def read_leaves(
    directory: str | Path, names: Sequence[tuple[str, str, tuple[int, ...]]],
    plain: Callable[[str], str], convert: Callable[[str, np.ndarray], np.ndarray], ignore: str,
) -> Params:  # fmt: skip
    """The tensors of a checkpoint as a tree of parameters.

    Args:
      directory: holds ``model.safetensors``, or the shards of its index.
      names: (leaf, name, stored shape) of every tensor; leaves below ``layers/`` come once per
        layer, in
        order, and are stacked.
      plain: name in the file -> name in `names`.
      convert: (name, stored tensor) -> that tensor in the layout of the leaf.
      ignore: a regex of names that are left alone.

    Returns:
      The tree, in the dtypes of the file.

    Raises:
      ValueError: tensors are missing, surplus, there twice, misshapen, of another dtype or not
        finite.
    """
    leaves: dict[str, list[np.ndarray]] = {}
    with contextlib.ExitStack() as files_to_close:
        stored: dict[str, tuple[str, Dynamic, Path]] = {}
        files = shards(directory)
        for path in files:
            file = files_to_close.enter_context(safe_open(path, framework="flax"))
            for name in file.keys():
                if (short := plain(name)) in stored:
                    first = stored[short][0]
                    raise ValueError(f"{path}: got {short} twice: {first!r} and {name!r}")
                stored[short] = name, file, path
        path = files[0] if len(files) == 1 else Path(directory) / INDEX
        known = {name for _, name, _ in names}
        missing = sorted(known - stored.keys())
        surplus = sorted(n for n in stored.keys() - known if not re.fullmatch(ignore, n))
        if missing or surplus:
            raise ValueError(f"{path}: missing tensors {missing}, surplus tensors {surplus}")
        for leaf, name, shape in names:
            original, file, source = stored[name]
            value = read_tensor(file, original, shape, source)
            leaves.setdefault(leaf, []).append(convert(name, value))
    return nest({leaf: stack_leaf(leaf, parts, path) for leaf, parts in leaves.items()})


def read_tensor(file: Dynamic, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """One tensor of an open file.

    Args:
      file: of `safetensors.safe_open`.
      name: of the tensor.
      shape: that it must have.
      path: of the file, for errors.

    Returns:
      The values, in the dtype of the file.

    Raises:
      ValueError: another shape, another dtype than float32, float16 and bfloat16, or values that
        are
        not finite.
    """
    view = file.get_slice(name)
    if (got := tuple(view.get_shape())) != shape:
        raise ValueError(f"{path}: {name}: got shape {got}, expected {shape}")
    if (dtype := view.get_dtype()) not in _DTYPES:
        raise ValueError(f"{path}: {name}: got dtype {dtype}, expected one of {list(_DTYPES)}")
    value = np.asarray(file.get_tensor(name))
    if not np.isfinite(value).all():
        count = int((~np.isfinite(value)).sum())
        raise ValueError(f"{path}: {name}: got {count} NaN or infinite values, expected none")
    return value


def stack_leaf(leaf: str, parts: list[np.ndarray], path: Path) -> jax.Array:
    """The tensors of all layers as one leaf.

    Args:
      leaf: path of the leaf.
      parts: its tensors; one, unless the path begins with ``layers/``.
      path: of the file, for errors.

    Returns:
      [L, ...] of all layers; of other leaves the only tensor.

    Raises:
      ValueError: layers of different dtypes.
    """
    if len(dtypes := sorted({str(p.dtype) for p in parts})) > 1:
        raise ValueError(f"{path}: {leaf}: got dtypes {dtypes} over the layers, expected one")
    return jnp.asarray(np.stack(parts) if leaf.startswith("layers/") else parts[0])


def nest(flat: dict[str, Shaped[Array, "..."]]) -> Params:
    """A tree from paths: {"a/b": x} -> {"a": {"b": x}}.

    Args:
      flat: {path: leaf}.

    Returns:
      Nested dicts.
    """
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flatten(tree: Params, prefix: str = "") -> dict[str, jax.Array]:
    """The inverse of `nest`.

    Args:
      tree: nested dicts.
      prefix: of the paths; for the recursion.

    Returns:
      {path: leaf}.
    """
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}/") if inner else {prefix + key: value}
    return flat
