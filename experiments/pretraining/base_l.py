"""The shipped base L: read and checked, never trained here.

`experiments.pretrain` writes the directory; `README.md` in it says how good the model is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from experiments.pretraining import card as cards
from experiments.pretraining import tokens
from experiments.workdir import StageError, digest, read_json
from jlora.models import decoder

FOLDER = Path(__file__).parent / "base_l"


@dataclasses.dataclass(frozen=True)
class BaseL:
    """A trained decoder with its encoding and card."""

    config: decoder.DecoderConfig
    params: dict[str, Any]  # float32
    tokenizer: Tokenizer
    card: dict[str, Any]


def load(folder: Path = FOLDER) -> BaseL:
    """Reads the model.

    Args:
      folder: as `experiments.pretrain` writes it.

    Raises:
      StageError: a file is missing or is not the one of the card.
      ValueError: weights that do not fit the architecture.
    """
    card = read_json(folder / cards.NAME, dict, "install the package again")
    for name, expected in card["files"].items():
        path = folder / name
        got = digest(path) if path.is_file() else "nothing"
        if got != expected:
            raise StageError(f"{path}: sha256: got {got}, expected {expected}")
    config, half = decoder.load(folder)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), half)
    return BaseL(config, params, tokens.read(folder / "tokenizer.json"), card)
