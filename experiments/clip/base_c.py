"""The shipped base C: read and checked, never trained here.

`experiments.pretrain_clip` writes the directory; `README.md` in it says how good the model is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments.clip import card as cards
from experiments.clip import model
from experiments.workdir import StageError, digest, read_json
from jlora.io import safetensors_file

FOLDER = Path(__file__).parent / "base_c"


@dataclasses.dataclass(frozen=True)
class BaseC:
    """A trained CLIP with the texts it knows, their embeddings, and its card."""

    config: model.ClipConfig
    params: dict[str, Any]  # float32
    names: tuple[str, ...]  # of all emoji
    labels: tuple[str, ...]  # their categories
    embeddings: np.ndarray  # float32 [names + labels, text]: of names, then of categories
    card: dict[str, Any]


def load(folder: Path = FOLDER) -> BaseC:
    """Reads the model.

    Args:
      folder: as `experiments.pretrain_clip` writes it.

    Raises:
      StageError: a file is missing or is not the one of the card.
      ValueError: weights or texts that do not fit the architecture.
    """
    card = read_json(folder / cards.NAME, dict, "install the package again")
    for name, expected in card["files"].items():
        path = folder / name
        got = digest(path) if path.is_file() else "nothing"
        if got != expected:
            raise StageError(f"{path}: sha256: got {got}, expected {expected}")
    config, params = model.load(folder)
    names, labels = tuple(card["names"]), tuple(card["labels"])
    half = safetensors_file.read(folder / cards.TEXTS)[0]["embeddings"]
    if half.shape != (wide := (len(names) + len(labels), config.text)):
        raise ValueError(f"{folder / cards.TEXTS}: got {half.shape}, expected {wide}")
    return BaseC(config, params, names, labels, half.astype(np.float32), card)
