"""What trains a base: the loop, which resumes at the newest checkpoint, and an optimizer."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.finetuning import mesh
from experiments.finetuning import train as loop
from experiments.progress import Progress
from experiments.workdir import read_json, write_json
from jlora.generation.diffusion import ema

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


def matrices(params: Any, stacked: str) -> Any:
    """Which parameters Muon takes: the stacked kernels, by (in, out) axes; None: AdamW.

    Args:
      params: of a base.
      stacked: part of the path of the blocks' parameters; axis 0 of each is the block.
    """
    kernel = optax.contrib.MuonDimensionNumbers(1, 2)

    def one(path: Any, _: Any) -> Any:
        name = jax.tree_util.keystr(path)
        return kernel if stacked in name and "kernel" in name else None

    return jax.tree_util.tree_map_with_path(one, params)


def optimizer(settings: Any, stacked: str, adam_decay: float) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks (AdamW for all else, or for all), then the average.

    Rates rise, stay, and fall to zero by the end, so that a run of more steps has the same start.

    Args:
      settings: with `optimizer` (muon or adamw), `lr`, `muon_lr`, `weight_decay`, `warmup`,
        `decay`, `steps`, `clip` and `ema`.
      stacked: of `matrices`.
      adam_decay: weight decay of what Muon leaves to AdamW.
    """
    warmup = max(1, round(settings.warmup * settings.steps))
    fall = max(1, round(settings.decay * settings.steps))
    flat = max(0, settings.steps - warmup - fall)

    def rate(peak: float) -> optax.Schedule:
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak),
             optax.linear_schedule(peak, 0.0, fall)], [warmup, warmup + flat],
        )  # fmt: skip

    def kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    if settings.optimizer == "adamw":
        rule = optax.adamw(
            rate(settings.lr), b2=0.95, weight_decay=settings.weight_decay, mask=kernels
        )
    else:
        rule = optax.contrib.muon(
            rate(settings.muon_lr), weight_decay=settings.weight_decay, adam_b2=0.95,
            adam_weight_decay=adam_decay, adam_learning_rate=rate(settings.lr),
            muon_weight_dimension_numbers=functools.partial(matrices, stacked=stacked),
        )  # fmt: skip
    clip = optax.clip_by_global_norm(settings.clip)
    return optax.chain(clip, rule, ema.average(settings.ema))
