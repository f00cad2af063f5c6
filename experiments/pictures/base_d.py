"""The model directory of base D: read and checked, never trained here.

`experiments.pretrain_pictures` writes it; `README.md` in it says how good the model is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.pictures import card as cards
from experiments.pictures import classifier
from experiments.workdir import StageError, digest, read_json
from jlora.models import dit

FOLDER = Path(__file__).parent / "base_d"  # of the package, where it ships the model


@dataclasses.dataclass(frozen=True)
class BaseD:
    """A trained DiT with the names it knows, the classifier of its card, and the card."""

    config: dit.DiTConfig
    params: dict[str, Any]  # float32
    classifier: Any  # parameters, float32
    names: dict[str, Any]  # "styles", "labels", "vocabulary", "longest_name"
    card: dict[str, Any]


def load(folder: Path = FOLDER, weights: str | None = None) -> BaseD:
    """Reads the model.

    Args:
      folder: as `experiments.pretrain_pictures` writes it.
      weights: sha256 that ``model.safetensors`` must have, for what was measured on one model;
        None: that of the card.

    Raises:
      StageError: a file is missing, is not the one of the card, or other weights are expected.
      ValueError: weights that do not fit the architecture.
    """
    card = read_json(folder / cards.NAME, dict, "train the model again")
    for name, expected in card["files"].items():
        path = folder / name
        got = digest(path) if path.is_file() else "nothing"
        if got != expected:
            raise StageError(f"{path}: sha256: got {got}, expected {expected}")
    if weights not in (None, card["files"]["model.safetensors"]):
        got = card["files"]["model.safetensors"]
        raise StageError(f"{folder}: sha256 of the weights: got {got}, expected {weights}")
    config, params = dit.load(folder)
    judge = classifier.load(folder / "classifier.safetensors")
    names = read_json(folder / cards.NAMES, dict, "train the model again")
    return BaseD(config, params, judge, names, card)
