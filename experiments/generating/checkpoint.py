r"""A generator as files: one safetensors file of 3 MB and the settings that it needs.

==================  ============================================================================
reading/mean        what `jlora.generation.generators.layer_reading` knows of the base: means, sizes
reading/...         and lengths as float32, the matrices ``readout`` and ``turn`` as float16
known/rows          what `class_memory` knows of the seen classes: their rows and axes as float16,
known/...           the rest as float32; absent where nothing is remembered
==================  ============================================================================

The base is not among the files. ``config.json`` holds the sha256 of its weights, and a generator is
never used on other ones: it would answer without an error, and wrongly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from experiments.config import Config
from experiments.stages.layered import Fitted
from experiments.stages.rivals import Frozen
from experiments.workdir import StageError, digest, read_json, write_json
from jlora.generation.generators.class_memory import Memory
from jlora.generation.generators.layer_reading import Reading

SHIPPED = Path(__file__).parent / "minilm"
WEIGHTS, CONFIG, CARD, PAGE = "generator.safetensors", "config.json", "card.json", "README.md"
FORMAT = 2  # of the files; 1 had a shared adapter
SETTINGS = (  # what the base, the head and the adapter depend on
    "base", "max_length", "layers", "head", "head_scale", "data_seed", "examples",
)  # fmt: skip
HALF = ("readout", "turn", "rows", "axes")  # tensors that are written as float16
REMEDY = "give the folder that experiments.pretrain_generator writes, or install the package again"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A generator."""

    config: Config  # of which SETTINGS are meant
    base_sha256: str  # `fingerprint` of the base's parameters
    fitted: Fitted  # how the base is read, and the classes that are remembered
    frozen: Frozen  # what seen tasks chose for the rivals


def fingerprint(params: Any) -> str:
    """sha256 of a model's parameters: names, shapes, types and bytes.

    Args:
      params: a PyTree of arrays.

    Returns:
      64 hex digits.
    """
    out = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        out.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        out.update(np.ascontiguousarray(array).tobytes())
    return out.hexdigest()


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the weights and the settings.

    Args:
      folder: exists; the caller renames it when it is whole.
      checkpoint: the generator.
    """
    save(folder / WEIGHTS, checkpoint.fitted)
    settings = dataclasses.asdict(checkpoint.config)
    about = {
        "format": FORMAT,
        "base_sha256": checkpoint.base_sha256,
        "settings": {name: settings[name] for name in SETTINGS},
        "rivals": checkpoint.frozen._asdict(),
    }
    write_json(folder / CONFIG, about)


def save(path: Path, fitted: Fitted) -> None:
    """Writes the weights: temporary file and rename.

    Args:
      path: of the file.
      fitted: the generator.
    """
    parts = {"reading": fitted.reading, "known": fitted.known}
    tensors = {
        f"{part}/{name}": np.asarray(value, np.float16 if name in HALF else np.float32)
        for part, own in parts.items()
        if own is not None
        for name, value in own._asdict().items()
    }
    temp = path.with_name(path.name + ".tmp")
    save_file(tensors, temp)
    os.replace(temp, path)


def read(folder: Path) -> Checkpoint:
    """Reads and checks a generator.

    Args:
      folder: as `write` and the card make it; where there is a card, files must be those it names.

    Returns:
      The generator, float32.

    Raises:
      StageError: a file that is missing, truncated, not the one of the card, of another format, or
        that holds other tensors, shapes or numbers that are not finite: path, got and expected.
    """
    if not folder.is_dir():
        raise StageError(f"{folder}: got no folder, expected a generator; {REMEDY}")
    if (folder / CARD).is_file():
        _compare(folder, read_json(folder / CARD, dict, REMEDY).get("files"))
    path = folder / CONFIG
    about = read_json(path, dict, REMEDY)
    if about.get("format") != FORMAT:
        raise StageError(f"{path}: format: got {about.get('format')!r}, expected {FORMAT}")
    try:
        config = Config(**{name: about["settings"][name] for name in SETTINGS})
        frozen = Frozen(**about["rivals"])
        base = str(about["base_sha256"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path}: got no {error}, expected the settings of a generator") from None
    return Checkpoint(config, base, restore(folder / WEIGHTS), frozen)


def _compare(folder: Path, files: Any) -> None:
    if not isinstance(files, dict):
        raise StageError(f"{folder / CARD}: files: got {files!r}, expected the sha256 of each")
    for name in (WEIGHTS, CONFIG):
        path = folder / name
        got = digest(path) if path.is_file() else "nothing"
        if got != files.get(name):
            raise StageError(f"{path}: sha256: got {got}, expected {files.get(name)}; {REMEDY}")


def restore(path: Path) -> Fitted:
    """Reads and checks the weights.

    Args:
      path: of the file.

    Returns:
      The generator, float32.

    Raises:
      StageError: as `read`.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{path}: got {error}, expected a safetensors file; {REMEDY}") from None
    parts: dict[str, Any] = {"reading": Reading, "known": Memory}
    if not any(name.startswith("known/") for name in tensors):
        del parts["known"]
    names = {f"{part}/{name}" for part, kind in parts.items() for name in kind._fields}
    if set(tensors) != names:
        odd = sorted(set(tensors) ^ names)
        raise StageError(f"{path}: got other tensors than expected: {', '.join(odd[:4])}")
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise StageError(f"{path}: {name}: got NaN or infinity, expected finite numbers")
    for name, shape in _shapes(tensors).items():
        if tensors[name].shape != shape:
            raise StageError(f"{path}: {name}: got shape {tensors[name].shape}, expected {shape}")
    own = {
        part: kind(*(jnp.asarray(tensors[f"{part}/{name}"], jnp.float32) for name in kind._fields))
        for part, kind in parts.items()
    }
    return Fitted(own["reading"], own.get("known"))


def _shapes(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """What must go with `reading/mean`, `reading/middle` and `known/places`."""
    layers, m, d = *_sizes(tensors["reading/mean"], 2), *_sizes(tensors["reading/middle"], 1)
    out: dict[str, tuple[int, ...]] = {
        "reading/mean": (layers, m), "reading/size": (layers,), "reading/readout": (m, d),
        "reading/middle": (d,), "reading/length": (), "reading/turn": (layers, d, d),
    }  # fmt: skip
    if "known/places" in tensors:
        count, axes = _sizes(tensors["known/places"], 2)
        out |= {
            "known/rows": (count, d + layers * m), "known/places": (count, axes),
            "known/counts": (count,), "known/axes": (d, axes), "known/centre": (d,),
            "known/spread": (), "known/calibration": (3,),
        }  # fmt: skip
    return out


def _sizes(tensor: np.ndarray, number: int) -> tuple[int, ...]:
    """The first sizes of a tensor, -1 for those it has not."""
    return (*tensor.shape, *(-1,) * number)[:number]
