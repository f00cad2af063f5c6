"""A run from its settings to a model directory with its quality card.

``<workdir>/train-<key>`` holds the pictures, the classifier and Orbax checkpoints;
``<workdir>/model`` the result. A killed run resumes at its newest checkpoint, and one whose
`--steps` were raised goes on along the longer schedule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from experiments import base_training
from experiments.pictures import card, classifier, data, sources, train
from experiments.pictures.settings import Settings
from jlora.generation.diffusion import ema

WORDS = 1_700  # about as many words as the default styles have


def pictures(settings: Settings, folder: Path, cache: Path | None) -> data.Pictures:
    """The pictures of a run; read from its folder where they are.

    Args:
      settings: of the run.
      folder: of the run.
      cache: of downloads.

    Raises:
      AssetError: a package cannot be had.
      ValueError: a style without pictures to train on or to measure by.
    """
    gathered = data.load(folder)
    if gathered is None:
        gathered = data.gathered(sources.pictures(settings.chosen, cache), settings.chosen)
        data.save(folder, gathered)
    return gathered


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
    gathered = pictures(settings, folder, cache)
    config = train.architecture(settings, gathered)

    def batch(number: int) -> tuple[Any, ...]:
        return train.batch(gathered, train.rows(gathered, settings, number))

    state, seconds = base_training.train(
        workdir, folder, settings.steps, settings.save_every, train.initial(settings, config),
        train.make(settings, config), batch,
    )  # fmt: skip
    judge = classifier.train(gathered, settings, folder, workdir)
    params = jax.device_get(ema.averaged(state.optimizer))
    return card.write(
        workdir / "model", settings, params, judge, gathered, seconds, int(state.step)
    )


def dry(settings: Settings) -> list[str]:
    """What a run takes, without reading a picture.

    Args:
      settings: of the run.
    """
    config = settings.config(WORDS)
    shapes = jax.eval_shape(lambda: train.initial(settings, config))
    size = sum(x.size for x in jax.tree.leaves(shapes.params))
    tables = shapes.params["style"]["embedding"].size + shapes.params["word"]["embedding"].size
    tokens = (sources.SIDE // settings.patch) ** 2
    work = 6 * (size - tables) * tokens * settings.batch * settings.steps
    return [
        f"parameters: {size:,} ({size * 2 / 1e6:.2f} MB in float16), with {WORDS:,} words",
        f"steps: {settings.steps} of {settings.batch} pictures of {tokens} patches",
        f"arithmetic: about {work / 1e12:.1f} TFLOP",
    ]


def lines(card: dict[str, Any], workdir: Path) -> list[str]:
    """The card in a few lines.

    Args:
      card: of `run`.
      workdir: of the run.
    """
    quality = card["quality"]
    table = [
        f"{name:>26}: style {x['style']:.1%}, label {x['label']:.1%}"
        for name, x in quality["accuracy"].items()
    ]
    far = ", ".join(f"{name} {x}" for name, x in quality["frechet"].items())
    return [
        "\nsaid by the classifier:", *table, f"Fréchet distance to held-out pictures: {far}", "",
        f"Model: {workdir / 'model'}",
    ]  # fmt: skip
