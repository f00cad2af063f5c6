"""The loop of a run: steps, checkpoints, and what a run that was killed continues from.

A checkpoint is a folder ``step-000123`` that Orbax commits whole; the newest two are kept. Rows and
random keys follow from the step, so a run that was killed ends with the same bits as one that was
not.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.finetuning import mesh
from experiments.finetuning.step import State
from experiments.progress import Progress
from experiments.workdir import load_tree, save_tree

KEPT = 2  # checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    folders = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(folders, key=lambda p: int(p.name[5:]))


def resume(folder: Path, state: State, places: Any) -> State:
    """The newest checkpoint of a folder, or the given state where there is none.

    Args:
      folder: of the checkpoints.
      state: before the first step; says what to expect.
      places: shardings of it.

    Raises:
      StageError: the checkpoint is damaged or of another run.
    """
    kept = checkpoints(folder)
    return mesh.place(load_tree(kept[-1], state) if kept else state, places)


def save(folder: Path, state: State) -> None:
    """Writes a checkpoint, then deletes the oldest ones."""
    save_tree(folder / f"step-{int(state.step):06d}", state)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def train(
    state: State,
    step: Callable[[State, int], tuple[State, Any]],
    steps: int,
    keep: Callable[[State], None],
    folder: Path,
    save_every: int,
    bar: Progress,
) -> State:
    """Runs all steps that are missing.

    Args:
      state: to continue from; its buffers may be donated.
      step: (state, number of the step) -> (state, report).
      steps: of the whole run.
      keep: writes a checkpoint (`save`, of what all processes have together).
      folder: of the checkpoints.
      save_every: steps between two of them; the last step has one.
      bar: progress and curves.

    Raises:
      FloatingPointError: a loss, gradient or result that is not finite, naming the step and the
        last good checkpoint, which is kept.
    """
    for number in range(int(state.step), steps):
        state, report = step(state, number)
        value, norm = float(report.loss), float(report.norm)
        if not bool(report.finite):
            last = (checkpoints(folder) or ["none"])[-1]
            raise FloatingPointError(
                f"step {number + 1}: got loss {value} and gradient norm {norm}, expected finite"
                f" numbers; the last good checkpoint is {last}; try a smaller --lr"
            )
        bar.step(1, loss=value)
        bar.curve(number + 1, {"loss": value, "gradient_norm": norm})
        if (number + 1) % save_every == 0 or number + 1 == steps:
            keep(state)
    return state
