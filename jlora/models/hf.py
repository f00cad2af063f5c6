"""What every reader of a Hugging Face directory needs: its config and its tensors, checked.

``read_config(directory, kind, fields, fixed, optional)``: ``config.json`` as a `kind`; ``fields``:
our names -> theirs; ``fixed``: fields that change the function and have one implemented value,
absent means that value; ``optional``: ours that may be absent.

``read_leaves(directory, names, plain, ours, ignore)``: ``model.safetensors`` (or the shards of
its index) as a tree; ``names``:
(leaf, name, stored shape) of every tensor; ``plain``: the file's name -> that name; ``ours(name,
value)``: the stored tensor in our layout; ``ignore``: a regex of names that are left alone. Leaves
below ``layers/`` come once a layer, in order, and are stacked.

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
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from jlora.io import safetensors_file
from jlora.io.inside import inside
from jlora.io.json_file import read_json
from jlora.models.encoder_config import Params

T = TypeVar("T")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 64 << 20  # bytes
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def read_config(
    directory: str | Path, kind: Callable[..., T], fields: Mapping[str, str],
    fixed: Mapping[str, Any], optional: Collection[str],
) -> T:  # fmt: skip
    """``config.json`` as a `kind`."""
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
    plain: Callable[[str], str], ours: Callable[[str, np.ndarray], np.ndarray], ignore: str,
) -> Params:  # fmt: skip
    """``model.safetensors`` as a tree of our leaves."""
    leaves: dict[str, list[np.ndarray]] = {}
    with contextlib.ExitStack() as opened:
        stored: dict[str, tuple[str, Any, Path]] = {}
        files = shards(directory)
        for path in files:
            file = opened.enter_context(safe_open(path, framework="flax"))
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
            leaves.setdefault(leaf, []).append(ours(name, value))
    return nest({leaf: stack_leaf(leaf, parts, path) for leaf, parts in leaves.items()})


def read_tensor(file: Any, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """One tensor of an open file; ValueError for another shape or dtype, or values not finite."""
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
    """The tensors of all layers as one leaf; of other leaves the only one."""
    if len(dtypes := sorted({str(p.dtype) for p in parts})) > 1:
        raise ValueError(f"{path}: {leaf}: got dtypes {dtypes} over the layers, expected one")
    return jnp.asarray(np.stack(parts) if leaf.startswith("layers/") else parts[0])


def nest(flat: dict[str, jax.Array]) -> Params:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flatten(tree: Params, prefix: str = "") -> dict[str, jax.Array]:
    """The inverse of `nest`."""
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}/") if inner else {prefix + key: value}
    return flat
