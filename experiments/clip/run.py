"""A run from its settings to a model directory with its quality card.

``<workdir>/train-<key>`` holds the pictures, the embeddings and Orbax checkpoints;
``<workdir>/model`` the result. A killed run resumes at its newest checkpoint, and one whose
`--steps` were raised goes on along the longer schedule.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import base_training
from experiments.clip import card, data, texts, train
from experiments.clip.settings import Settings
from experiments.pictures import sources
from jlora.generation.diffusion import ema


def pairs(settings: Settings, folder: Path, cache: Path | None) -> data.Pairs:
    """The pictures and texts of a run; read from its folder where they are.

    Args:
      settings: of the run.
      folder: of the run.
      cache: of downloads.

    Raises:
      AssetError: a package cannot be had.
      ValueError: a style without pictures to train on or to measure by.
    """
    loaded = data.load(folder)
    if loaded is None:
        loaded = data.gathered(sources.pictures(settings.chosen, cache), settings.chosen)
        embeddings = texts.embed(loaded.names + loaded.labels, cache)
        loaded = dataclasses.replace(loaded, embeddings=embeddings)
        data.save(folder, loaded)
    return loaded


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
    loaded = pairs(settings, folder, cache)
    config = settings.config(loaded.embeddings.shape[1])
    first = train.initial(settings, config, jnp.asarray(train.mean_text(loaded)))
    state, seconds = base_training.train(
        workdir, folder, settings.steps, settings.save_every, first, train.make(settings, config),
        lambda number: (train.batch(loaded, settings, number),),
    )  # fmt: skip
    params = jax.device_get(ema.averaged(state.optimizer))
    return card.write(workdir / "model", settings, params, loaded, seconds, int(state.step))


def dry(settings: Settings) -> list[str]:
    """What a run takes, without reading a picture.

    Args:
      settings: of the run.
    """
    config, mean = settings.config(texts.WIDTH), jnp.zeros(texts.WIDTH)
    shapes = jax.eval_shape(lambda: train.initial(settings, config, mean)).params
    size = sum(x.size for x in jax.tree.leaves(shapes))
    tokens = config.vit.patches + 1
    blocks = sum(x.size for x in jax.tree.leaves(shapes["vit"]["layers"]))
    work = 6 * blocks * tokens * settings.batch * settings.steps
    return [
        f"parameters: {size:,} ({size * 2 / 1e6:.2f} MB in float16)",
        f"steps: {settings.steps} of {settings.batch} pairs, {tokens} tokens a picture",
        f"arithmetic: about {work / 1e12:.1f} TFLOP",
    ]


def lines(card: dict[str, Any], workdir: Path) -> list[str]:
    """The card in a few lines.

    Args:
      card: of `run`.
      workdir: of the run.
    """
    table = [
        f"{style:>16}: top 1 {x['base C'][0]:.1%}, top 5 {x['base C'][1]:.1%}"
        f" of {x['names']} names (chance {x['chance'][0]:.2%})"
        for style, x in card["quality"]["names"].items()
    ]
    return ["\nheld-out names, zero-shot:", *table, "", f"Model: {workdir / 'model'}"]
