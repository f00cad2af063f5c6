"""A resumable training loop: jitted scans over chunks of steps, Orbax checkpoints between them.

Step s draws everything from fold_in(key, s), so a killed run ends bitwise equal to one that was
never disturbed.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.progress import Progress
from experiments.workdir import load_tree, save_tree, steps_kept

PyTree = Any
Step = Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, dict[str, jax.Array]]]


@functools.partial(jax.jit, static_argnums=0)
def many(step: Step, state: PyTree, data: PyTree, key: jax.Array, at: jax.Array) -> Any:
    """The steps numbered `at` [n]; compiled once a step function and shape."""

    def body(carry: PyTree, s: jax.Array) -> tuple[PyTree, dict[str, jax.Array]]:
        return step(carry, data, jax.random.fold_in(key, s))

    return jax.lax.scan(body, state, at)


def train(
    step: Step,
    state: PyTree,
    data: PyTree,
    key: jax.Array,
    *,
    steps: int,
    chunk: int,
    save_every: int,
    folder: Path,
    bar: Progress,
    label: str,
) -> tuple[PyTree, dict[str, list[float]]]:
    """Run `steps` steps of `step(state, data, key) -> (state, metrics)`.

    Returns the last state and each metric as a list, one number per step. Raises FloatingPointError
    naming the step when the metric "loss" is not finite.
    """
    done, curves = 0, {}
    kept = steps_kept(folder)
    if kept:
        done = int(kept[-1].name[5:])
        with np.load(folder / f"curves_{done}.npz") as old:
            curves = {k: old[k].tolist() for k in old.files}
        state = jax.tree.map(jnp.asarray, load_tree(kept[-1], state))
        bar.step(done)
    while done < steps:
        length = min(chunk, steps - done)
        state, metrics = many(step, state, data, key, done + jnp.arange(length, dtype=jnp.int32))
        metrics = {k: np.asarray(v, np.float64) for k, v in metrics.items()}
        bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
        if bad.size:
            raise FloatingPointError(f"{label}: the loss is not finite at step {done + bad[0]}")
        for name, values in metrics.items():
            curves.setdefault(name, []).extend(values.tolist())
        done += length
        bar.step(length, **{k: float(v.mean()) for k, v in metrics.items()})
        bar.curve(done, {f"{label}/{k}": float(v.mean()) for k, v in metrics.items()})
        if done == steps or done % save_every < length:
            folder.mkdir(parents=True, exist_ok=True)
            kept_curves: dict[str, Any] = {k: np.asarray(v) for k, v in curves.items()}
            np.savez(folder / f"curves_{done}.npz", **kept_curves)
            save_tree(folder / f"step_{done}", state)
            for old in kept:
                shutil.rmtree(old, ignore_errors=True)
                (folder / f"curves_{old.name[5:]}.npz").unlink(missing_ok=True)
            kept = [folder / f"step_{done}"]
    return state, curves
