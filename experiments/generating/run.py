"""A run from its settings to a generator with its card.

``<workdir>/data-<key>`` has the base's states of all texts (a stage of `experiments.cond_pdiff`),
``<workdir>/generator-<key>`` what was computed of them, ``<workdir>/generator`` the result. A
killed run resumes at the texts that it had not read, or at the figures that it had not measured.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import Config
from experiments.generating import card, checkpoint, measure
from experiments.generating.checkpoint import Checkpoint
from experiments.progress import Progress
from experiments.stages import base_model, layered, rivals
from experiments.stages import world as world_lib
from experiments.stages.layered import Fitted
from experiments.stages.rivals import Frozen
from experiments.stages.world import World
from experiments.workdir import StageError, digest, read_json, write_json

RESULT = "generator"
CHOOSING = 12  # seen tasks that choose what rivals need


class Trained(NamedTuple):
    """What a run learns."""

    fitted: Fitted  # float32
    tasks: list[str]  # whose training texts were read


def train(world: World, workdir: Path) -> Trained:
    """The generator of the seen tasks.

    Args:
      world: of all tasks.
      workdir: of the run.

    Returns:
      What `<workdir>/generator-<key>` holds, computed where it does not.

    Raises:
      StageError: a damaged file.
    """
    folder, names = _folder(world, workdir), world.names("seen")
    if not (folder / checkpoint.WEIGHTS).is_file():
        with Progress(workdir, "layers", layered.TURNED + 1, "step") as bar:
            fitted = layered.fit(world, names, bar)
        checkpoint.save(folder / checkpoint.WEIGHTS, fitted)
    return Trained(checkpoint.restore(folder / checkpoint.WEIGHTS), names)


def _folder(world: World, workdir: Path) -> Path:
    folder = workdir / f"generator-{world.config.key('zoo')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(
    config: Config,
    workdir: Path,
    cache: Path | None = None,
    lora: bool = True,
    measured: int = 0,
) -> dict[str, Any]:
    """Computes, writes, reads again, measures what was read; returns the card.

    Args:
      config: settings; tasks without a seen one cannot work.
      workdir: of all that is written.
      cache: of downloads.
      lora: whether LoRA is trained on the examples too, which takes longer than all other figures.
      measured: tasks of each held-out level that are measured; 0: all.

    Returns:
      The card, which is ``<workdir>/generator/card.json`` too.

    Raises:
      StageError: no seen task, or a damaged file of an earlier call.
      ValueError: the base says the same of every text, or NaN or infinity.
    """
    world = world_lib.build(config, workdir, cache)
    names = world.names("seen")
    if not names:
        raise StageError(f"tasks: got {config.tasks} without a seen task, expected some to train")
    trained = train(world, workdir)
    folder = _folder(world, workdir)
    chosen = folder / "rivals.json"
    if not chosen.is_file():
        some = names[:: -(-len(names) // CHOOSING)]
        write_json(chosen, rivals.choose(world, some)._asdict())
    frozen = Frozen(**read_json(chosen, dict, f"delete {chosen}"))
    base = checkpoint.fingerprint(base_model.load(config, cache).params)
    temp, target = workdir / f"{RESULT}.tmp", workdir / RESULT
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    checkpoint.write(temp, Checkpoint(config, base, trained.fitted, frozen))
    written = checkpoint.read(temp)
    figures = measure.measure(world, written.fitted, frozen, folder, workdir, lora, measured)
    about = card.make(world, trained, figures)
    about["files"] = {p.name: digest(p) for p in sorted(temp.iterdir())}
    write_json(temp / checkpoint.CARD, about)
    (temp / checkpoint.PAGE).write_text(card.page(about), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temp, target)
    return about
