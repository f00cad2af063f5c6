"""A run from its settings to a generator with its card.

``<workdir>/data-<key>`` holds the base's states of all texts (a stage of `experiments.cond_pdiff`),
``<workdir>/generator-<key>`` the training, ``<workdir>/generator`` the result. A killed run resumes
at its newest checkpoint, or at the figures that it had not measured.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.generating import card, checkpoint, measure
from experiments.generating.checkpoint import Checkpoint
from experiments.progress import Progress
from experiments.stages import base_model, episode_training, episodes, rivals
from experiments.stages import world as world_lib
from experiments.stages.episode_training import Fitted
from experiments.stages.rivals import Frozen
from experiments.stages.world import World
from experiments.workdir import StageError, digest, load_tree, read_json, save_tree, write_json

RESULT = "generator"
CHOSEN = "chosen.json"
VALIDATED = 6  # tasks of the corpora left out that are solved after each round
CHOOSING = 12  # seen tasks that choose what rivals need


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gives."""

    fitted: Fitted  # float32, of the best round
    tasks: list[str]  # that were trained on
    left_out: list[str]  # corpora that chose the round
    steps: int  # of that round
    validation: list[float]  # accuracy on tasks of those corpora, by round


def train(world: World, workdir: Path) -> Trained:
    """The generator of the seen tasks, stopped where corpora that are left out are best solved.

    Args:
      world: of all tasks.
      workdir: of the run.

    Returns:
      What `<workdir>/generator-<key>` holds, trained where it does not.

    Raises:
      StageError: a damaged checkpoint.
      FloatingPointError: a step that is not finite.
    """
    folder = _folder(world, workdir)
    if not (folder / CHOSEN).is_file():  # written last
        best, about = _rounds(world, folder, workdir)
        save_tree(folder / "fitted", best)
        write_json(folder / CHOSEN, about)
    about = read_json(folder / CHOSEN, dict, f"delete {folder}")
    fitted = load_tree(folder / "fitted", episode_training.empty(world))
    return Trained(jax.tree.map(jnp.asarray, fitted), **about)


def _rounds(world: World, folder: Path, workdir: Path) -> tuple[Fitted, dict[str, Any]]:
    """(the best round's state, what is said of it); without a corpus left out the last round's."""
    steps = world.config.episode_steps
    kept, out = episode_training.parted(world, world.names("seen"))
    some = out[:: -(-len(out) // VALIDATED)] if out else []
    best, taken, validation = None, 0, [0.0][:0]
    with Progress(workdir, "episodes", steps, "step") as bar:
        states = episode_training.rounds(world, kept, steps, folder / "work_kept", bar)
        for number, state in enumerate(states):
            if some:
                of = episodes.adapted(world, state)
                hits = [episodes.validated(of, name) for name in some]
                validation.append(float(np.mean(hits)))
            if not some or validation[-1] > max([-1.0, *validation[:-1]]):
                best, taken = state, min(number * episode_training.ROUND, steps)
    assert best is not None, "there is a state before the first round"
    there = {world.task(name).corpus for name in kept}  # a task of two corpora may be left out
    corpora = sorted({world.task(name).corpus for name in out} - there)
    about = {"tasks": kept, "left_out": corpora, "steps": taken, "validation": validation}
    return best, about


def _folder(world: World, workdir: Path) -> Path:
    folder = workdir / f"generator-{world.config.key('episodes')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(
    config: Config,
    workdir: Path,
    cache: Path | None = None,
    lora: bool = True,
    measured: int = 0,
) -> dict[str, Any]:
    """Trains, writes, reads again, measures what was read; returns the card.

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
      FloatingPointError: a step that is not finite.
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
