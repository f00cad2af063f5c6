"""A pixel DiT in a directory: ``config.json`` and float16 ``model.safetensors``.

Tensors are called as the leaves of the parameters, ``blocks/attention/query/kernel``, kernels
(in, out), those of all blocks as one tensor. Both files are written to a temporary name and
renamed, and refused when anything about them is not as the architecture says.

Reference: original to jlora: there is no published layout for these models.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora.io import safetensors_file
from jlora.io.json_file import read_json
from jlora.models.dit.config import DiTConfig
from jlora.models.dit.model import init
from jlora.models.hf import SINGLE, flatten, nest
from jlora.types import Json, Tree

MODEL_TYPE = "pixel_dit"
LARGEST = 1 << 30  # bytes of a file that is read


def save(directory: str | Path, config: DiTConfig, params: Tree) -> None:
    """Writes a model, its numbers rounded to float16.

    Args:
      directory: made if it does not exist.
      config: the architecture.
      params: its parameters.

    Raises:
      ValueError: a parameter is missing, surplus, misshapen or not finite in float16.
    """
    directory = Path(directory)
    with np.errstate(over="ignore"):  # what overflows is refused below, by name
        half = {name: np.asarray(x).astype(np.float16) for name, x in flatten(params).items()}
    _check(directory, half, config)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(directory / SINGLE, half, {"format": "jlora"})
    fields = {"model_type": MODEL_TYPE} | dataclasses.asdict(config)
    data = (json.dumps(fields, indent=2) + "\n").encode()
    safetensors_file.write_bytes(directory / "config.json", data)


def load(directory: str | Path) -> tuple[DiTConfig, Tree]:
    """Reads a model.

    Args:
      directory: as `save` writes it; its files need not be trusted.

    Returns:
      The architecture, and the parameters in float32, in which they are computed with.

    Raises:
      ValueError: a file is missing or broken, a field is missing, unknown or of another type, a
        tensor is missing, surplus, misshapen, not float16 or not finite.
    """
    directory = Path(directory)
    config = _config(directory / "config.json")
    path = directory / SINGLE
    tensors, _ = safetensors_file.read(path, LARGEST)
    _check(path, tensors, config)
    return config, nest({k: jnp.asarray(x.astype(np.float32)) for k, x in tensors.items()})


def _config(path: Path) -> DiTConfig:
    raw: Json = read_json(path)
    if (got := raw.pop("model_type", None)) != MODEL_TYPE:
        raise ValueError(f"{path}: model_type: got {got!r}, expected {MODEL_TYPE!r}")
    fields = {f.name: f.type for f in dataclasses.fields(DiTConfig)}
    if raw.keys() != fields.keys():
        raise ValueError(f"{path}: got fields {sorted(raw)}, expected {sorted(fields)}")
    for name, kind in fields.items():
        if type(raw[name]) is not kind:
            raise ValueError(f"{path}: {name}: got {raw[name]!r}, expected {kind}")
    try:
        return DiTConfig(**raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check(path: Path, tensors: dict[str, np.ndarray], config: DiTConfig) -> None:
    shapes = flatten(jax.eval_shape(lambda: init(jax.random.key(0), config)))
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"{path}: missing {missing}")
    if surplus := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"{path}: unexpected {surplus}")
    for name, value in tensors.items():
        if value.shape != shapes[name].shape or value.dtype != np.float16:
            raise ValueError(
                f"{path}: {name}: got {value.dtype} {value.shape}, expected float16"
                f" {shapes[name].shape}"
            )
