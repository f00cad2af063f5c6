"""A run from its settings to a checkpoint directory with its quality card.

``<workdir>/train-<key>`` holds the encoding, the streams of tokens and Orbax checkpoints;
``<workdir>/model`` the result. A killed run resumes at its newest checkpoint, and one whose
`--steps` were raised goes on along the longer schedule.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from experiments import base_training
from experiments.pretraining import card, texts, tokens, train
from experiments.pretraining.settings import Settings
from experiments.workdir import read_json, save_array, write_json


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains on and is measured by."""

    tokenizer: Tokenizer
    train: np.ndarray  # uint16 [tokens]
    held_out: np.ndarray  # uint16 [tokens]
    documents: dict[str, list[int]]  # source -> documents trained on, held out, characters


def data(settings: Settings, folder: Path, cache: Path | None) -> Data:
    """The encoding and the streams; read from the folder where a run has made them.

    Args:
      settings: of the run.
      folder: of the run.
      cache: of downloads.

    Raises:
      AssetError: a package cannot be had.
      ValueError: too few texts for the vocabulary or for one row.
    """
    streams, about = folder / "tokens.npz", folder / "documents.json"
    if about.is_file():  # written last
        with np.load(streams) as file:
            train_ids, held_out = file["train"], file["held_out"]
        counts = read_json(about, dict, f"delete {folder}")
        return Data(tokens.read(folder / "tokenizer.json"), train_ids, held_out, counts)
    documents = texts.documents(settings.chosen, cache)
    tokenizer = tokens.train(documents, settings.vocab)
    train_ids, held_out = (tokens.stream(tokenizer, documents, held) for held in (False, True))
    for name, stream in (("train", train_ids), ("held_out", held_out)):
        if len(stream) <= settings.context:
            raise ValueError(f"{name}: got {len(stream)} tokens, expected > {settings.context}")
    temp = folder / "tokenizer.json.tmp"
    tokenizer.save(str(temp))
    os.replace(temp, folder / "tokenizer.json")
    save_array(streams, train=train_ids, held_out=held_out)
    counts = {}
    for source in settings.chosen:
        own = [d for d in documents if d.source == source]
        out = sum(d.held_out for d in own)
        counts[source] = [len(own) - out, out, sum(len(d.text) for d in own)]
    write_json(about, counts)
    return Data(tokenizer, train_ids, held_out, counts)


def run(settings: Settings, workdir: Path, cache: Path | None = None) -> dict[str, Any]:
    """Trains, measures, writes ``<workdir>/model`` and returns its card.

    Args:
      settings: of the run.
      workdir: of all that is written.
      cache: of downloads.

    Raises:
      StageError: a damaged checkpoint.
      FloatingPointError: a step that is not finite; the last good checkpoint is kept.
    """
    folder = workdir / f"train-{settings.key()}"
    folder.mkdir(parents=True, exist_ok=True)
    corpus = data(settings, folder, cache)
    state, seconds = base_training.train(
        workdir, folder, settings.steps, settings.save_every, train.initial(settings),
        train.make(settings), lambda number: (train.rows(corpus.train, settings, number),),
    )  # fmt: skip
    return card.write(
        workdir / "model", settings, jax.device_get(state.params), corpus.tokenizer, corpus.train,
        corpus.held_out, corpus.documents, seconds, int(state.step),
    )  # fmt: skip


def dry(settings: Settings) -> list[str]:
    """What a run takes, without reading a text.

    Args:
      settings: of the run.
    """
    shapes = jax.eval_shape(lambda: train.initial(settings))
    size = sum(x.size for x in jax.tree.leaves(shapes.params))
    rows = settings.batch * settings.context
    return [
        f"parameters: {size:,} ({size * 2 / 1e6:.2f} MB in float16)",
        f"steps: {settings.steps} of {settings.batch} x {settings.context} tokens,"
        f" {settings.steps * rows:,} together",
        f"arithmetic: about {6 * size * rows * settings.steps / 1e12:.1f} TFLOP",
    ]


def lines(card: dict[str, Any], workdir: Path) -> list[str]:
    """The card in a few lines.

    Args:
      card: of `run`.
      workdir: of the run.
    """
    table = [
        f"{name:>9}: perplexity {figures['perplexity']:8.2f}, {figures['bits_per_byte']:.3f} bits"
        " per byte"
        for name, figures in card["quality"].items()
        if isinstance(figures, dict)
    ]
    return ["\nheld-out documents:", *table, "", f"Model: {workdir / 'model'}"]
