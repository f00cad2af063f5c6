"""The loop that trains a base: it resumes at the newest checkpoint and counts its seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.finetuning import mesh
from experiments.finetuning import train as loop
from experiments.progress import Progress
from experiments.workdir import read_json, write_json

SECONDS = "seconds.json"  # of all processes that trained this run


class Trained(NamedTuple):
    """The end of a training."""

    state: Any  # with `step`, `params`, `optimizer`
    seconds: float  # of all processes that trained


def train(
    workdir: Path,
    folder: Path,
    steps: int,
    save_every: int,
    initial: Any,
    step: Callable[..., tuple[Any, Any]],
    batch: Callable[[int], tuple[Any, ...]],
) -> Trained:
    """Trains to a number of steps, from the newest checkpoint where there is one.

    Args:
      workdir: of the progress bar's curves.
      folder: of checkpoints and seconds.
      steps: of the whole training.
      save_every: steps between checkpoints.
      initial: the state before the first step.
      step: ``(state, *batch) -> (state, report)``.
      batch: arrays of a step by its number.

    Returns:
      The last state, and what it took.

    Raises:
      StageError: a damaged checkpoint.
      FloatingPointError: a step that is not finite; the last good checkpoint is kept.
    """
    saved = folder / "checkpoints"
    saved.mkdir(parents=True, exist_ok=True)
    one = NamedSharding(mesh.mesh(1, 1), PartitionSpec())
    resumed = bool(loop.checkpoints(saved))
    before = read_json(folder / SECONDS, dict, "delete it")["seconds"] if resumed else 0.0
    # the loop knows the state of a fine-tuning run: it reads `step` alone
    state: Any = loop.resume(saved, cast(Any, initial), one)
    start = time.perf_counter()

    def advance(state: Any, number: int) -> Any:
        return step(state, *jax.device_put(batch(number), one))

    def keep(state: Any) -> None:
        seconds = before + time.perf_counter() - start
        write_json(folder / SECONDS, {"seconds": round(seconds, 1)})
        loop.save(saved, state)

    with Progress(workdir, "train", steps, "step") as bar:
        bar.step(int(state.step))
        state = loop.train(state, advance, steps, keep, saved, save_every, bar)
    return Trained(state, read_json(folder / SECONDS, dict, "delete it")["seconds"])
