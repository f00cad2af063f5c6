r"""A trained generator as files: one safetensors file of 3 MB and the settings that it needs.

=========  =====================================================================================
theta      factors of the shared adapter, float16
S          covariance of training texts within their classes, [m, m]
d          its standard deviations, :math:`d_i = \sqrt{S_{ii}}`, float32
c          the upper triangle of :math:`S_{ij} / (d_i d_j)` by rows, m (m + 1) / 2, float16
mu         mean of training texts, float32 [m]
numbers    logarithms of shrinkage, ridge and gain, float32 [3]
=========  =====================================================================================

S is symmetric and its variances differ by orders of magnitude: correlations keep their precision in
float16, and half of them is enough. Its axes are computed again when it is read.

The base is not among the files. ``config.json`` holds the sha256 of its weights, and a generator is
never used on other ones: it would answer without an error, and wrongly.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from experiments.config import Config
from experiments.stages.episode_training import Fitted
from experiments.stages.rivals import Frozen
from experiments.workdir import StageError, digest, read_json, write_json
from jlora.generation.generators.episodic import Learned, Statistics

SHIPPED = Path(__file__).parent / "minilm"
WEIGHTS, CONFIG, CARD, PAGE = "generator.safetensors", "config.json", "card.json", "README.md"
FORMAT = 1  # of the files
SETTINGS = (  # what the base, the head and the adapter depend on
    *("base", "max_length", "layers", "head", "head_scale", "data_seed", "examples"),
    "episode_rank",
)
REMEDY = "give the folder that experiments.pretrain_generator writes, or install the package again"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained generator."""

    config: Config  # of which SETTINGS are meant
    base_sha256: str  # `fingerprint` of the base's parameters
    fitted: Fitted  # shared adapter, shrinkage, ridge, gain and statistics
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


def write(folder: Path, found: Checkpoint) -> None:
    """Writes the weights and the settings.

    Args:
      folder: exists; the caller renames it when it is whole.
      found: the generator.
    """
    save_file(_tensors(found.fitted), folder / WEIGHTS)
    settings = dataclasses.asdict(found.config)
    about = {
        "format": FORMAT,
        "base_sha256": found.base_sha256,
        "settings": {name: settings[name] for name in SETTINGS},
        "rivals": found.frozen._asdict(),
        "sites": {path: sorted(leaves) for path, leaves in found.fitted.learned.shared.items()},
    }
    write_json(folder / CONFIG, about)


def _tensors(fitted: Fitted) -> dict[str, np.ndarray]:
    out = {
        f"shared/{path}/{name}": np.asarray(leaf, np.float16)
        for path, leaves in fitted.learned.shared.items()
        for name, leaf in leaves.items()
    }
    basis, variances, mean = (np.asarray(x, np.float64) for x in fitted.texts)
    covariance = (basis * variances) @ basis.T
    deviations = np.sqrt(np.maximum(np.diag(covariance), np.finfo(np.float32).tiny))
    rows = np.triu_indices(len(mean))
    correlations = (covariance / np.outer(deviations, deviations))[rows]
    numbers = fitted.learned.log_shrinkage, fitted.learned.log_ridge, fitted.learned.log_gain
    return out | {
        "texts/correlations": correlations.astype(np.float16),
        "texts/deviations": deviations.astype(np.float32),
        "texts/mean": mean.astype(np.float32),
        "numbers": np.asarray([float(x) for x in numbers], np.float32),
    }


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
        settings, sites = {name: about["settings"][name] for name in SETTINGS}, about["sites"]
        config, frozen = Config(**settings), Frozen(**about["rivals"])
        names = {f"shared/{p}/{leaf}": (p, leaf) for p, own in sites.items() for leaf in own}
        base = str(about["base_sha256"])
    except (KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path}: got no {error}, expected the settings of a generator") from None
    return Checkpoint(config, base, _fitted(folder / WEIGHTS, names), frozen)


def _compare(folder: Path, files: Any) -> None:
    if not isinstance(files, dict):
        raise StageError(f"{folder / CARD}: files: got {files!r}, expected the sha256 of each")
    for name in (WEIGHTS, CONFIG):
        path = folder / name
        got = digest(path) if path.is_file() else "nothing"
        if got != files.get(name):
            raise StageError(f"{path}: sha256: got {got}, expected {files.get(name)}; {REMEDY}")


def _fitted(path: Path, names: dict[str, tuple[str, str]]) -> Fitted:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{path}: got {error}, expected a safetensors file; {REMEDY}") from None
    own = {"texts/correlations", "texts/deviations", "texts/mean", "numbers"}
    if set(tensors) != own | set(names):
        odd = sorted(set(tensors) ^ (own | set(names)))
        raise StageError(f"{path}: got other tensors than expected: {', '.join(odd[:4])}")
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise StageError(f"{path}: {name}: got NaN or infinity, expected finite numbers")
    deviations, mean, numbers = (tensors[n] for n in ("texts/deviations", "texts/mean", "numbers"))
    m = mean.size
    shapes = {"texts/deviations": (m,), "texts/mean": (m,), "numbers": (3,),
              "texts/correlations": (m * (m + 1) // 2,)}  # fmt: skip
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise StageError(f"{path}: {name}: got shape {tensors[name].shape}, expected {shape}")
    half = np.zeros((m, m))
    half[np.triu_indices(m)] = tensors["texts/correlations"]
    whole = (half + np.triu(half, 1).T) * np.outer(deviations, deviations)
    variances, basis = np.linalg.eigh(whole)
    arrays = basis, np.maximum(variances, 0.0), mean
    shared: dict[str, dict[str, jax.Array]] = {}
    for name, (site, leaf) in names.items():
        shared.setdefault(site, {})[leaf] = jnp.asarray(tensors[name], jnp.float32)
    learned = Learned(shared, *(jnp.float32(x) for x in numbers))
    return Fitted(learned, Statistics(*(jnp.asarray(x, jnp.float32) for x in arrays)))
