"""Training of the zoo's adapters: R runs at once over one frozen base.

Runs are a vmapped axis, sharded over all devices when their number divides the chunk: the base's
matmuls see all runs' rows as one batch, only the adapter's own products are per run. A chunk of
runs is checkpointed every `zoo_segment` steps and its rows are drawn from (seed, run, step), so a
killed run resumes where it stopped and ends bitwise the same.
"""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jlora as jl
from experiments.config import Config
from experiments.progress import Progress
from experiments.stages.world import World, classifier
from experiments.workdir import load_tree, save_tree, steps_kept
from jlora.models import encoder

PyTree = Any
POOL = 8192  # most training rows of a run; the multi-task run is drawn down to it


class Run(NamedTuple):
    """One adapter to train."""

    name: str  # unique: "<task>/<seed>" or "multitask"
    tasks: tuple[str, ...]  # its training tasks (one, or all seen ones)
    seed: int  # seeds zoo runs 0.. ; the reference run is the last one


class Recipe(NamedTuple):
    """Every setting that `segment` reads; static, so that no other setting recompiles it."""

    rate: float  # peak learning rate
    steps: int  # length of a whole run: of the schedule and the snapshots
    batch: int  # rows per step and run
    snapshots: int  # copies kept of the last third of a run
    head_scale: float  # logit scale of the frozen head
    seed: int  # of the drawn rows


class Base(NamedTuple):
    """What all runs share; arrays only."""

    upper: PyTree  # parameters of the adapted layers
    adapter: jl.Adapter  # sites and frozen parts; its trainable is replaced by each run's own
    hidden: jax.Array  # [N, t, d] f32, states entering the adapted layers
    mask: jax.Array  # [N, t] bool, real tokens
    heads: jax.Array  # [n, C, d] f32, frozen class vectors


class Rows(NamedTuple):
    """What each of R runs draws its rows from."""

    table: jax.Array  # [R, POOL, 3] int32 (text, label, head)
    sizes: jax.Array  # [R] int32, how many rows of the table are the run's
    ids: jax.Array  # [R] int32, a number per run name: with seed and step it decides the draw


class TrainState(NamedTuple):
    """State of a chunk of R runs."""

    trainable: PyTree  # leaves [R, ...]
    moments: PyTree  # optimizer state, leaves [R, ...]
    snapshots: PyTree  # leaves [R, S, ...]: copies taken at the snapshot steps
    loss: jax.Array  # [R] f32, mean training loss of the last segment


def template(world: World, seed: int) -> jl.Adapter:
    """A fresh adapter of the task model; with `frozen_A` its `a` is the one all runs share."""
    config = world.config
    method = jl.LoRA(rank=config.rank, alpha=config.alpha, freeze_a=config.canonical == "frozen_A")
    return fresh(world, config.sites, method, seed)


def fresh(world: World, sites: str, method: jl.LoRA, seed: int) -> jl.Adapter:
    """A fresh LoRA adapter of the task model.

    Args:
      sites: regex of adapted paths. method: of all of them. seed: of its key.

    Returns:
      The same arrays for equal shapes and settings: the model is traced once for them.
    """
    given = (world.upper, world.hidden[:1], world.mask[:1], world.heads[:1])
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda *arrays: arrays, *given))
    return _fresh(world.model, world.config.head_scale, sites, method, seed, tree, *shapes)


@functools.lru_cache(maxsize=64)
def _fresh(
    model: encoder.EncoderConfig, scale: float, sites: str, method: jl.LoRA, seed: int,
    tree: Any, *shapes: jax.ShapeDtypeStruct,
) -> jl.Adapter:  # fmt: skip
    given = jax.tree.unflatten(tree, shapes)  # LoRA reads no weight
    return jl.init(jax.random.key(seed), classifier(model, scale), *given, methods={sites: method})


def start_points(world: World, runs: Sequence[Run]) -> PyTree:
    """Initial trainables [R, ...]: equal for all runs, or one draw per run when `a` is trained."""
    if world.config.canonical == "frozen_A":
        one = template(world, world.config.seed).trainable
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(runs), *x.shape)), one)
    seeds = [zlib.crc32(f"{world.config.seed}/{r.name}".encode()) & 0x7FFFFFFF for r in runs]
    trees = [template(world, s).trainable for s in seeds]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def pools(world: World, runs: Sequence[Run]) -> Rows:
    """Training rows of each run, and the numbers that its draws depend on."""
    order = {t.name: i for i, t in reversed(list(enumerate((*world.tasks, *world.pool))))}
    table = np.zeros((len(runs), POOL, 3), np.int32)
    sizes = np.zeros(len(runs), np.int32)
    for k, run in enumerate(runs):
        parts = []
        for name in run.tasks:
            rows = world.rows[name, "train"]
            head = np.full_like(rows.label, order[name])
            parts.append(np.stack([rows.index, rows.label, head], 1))
        part = np.concatenate(parts)
        if len(part) > POOL:
            part = part[np.random.default_rng(0).permutation(len(part))[:POOL]]
        table[k, : len(part)], sizes[k] = part, len(part)
    ids = [zlib.crc32(run.name.encode()) & 0x7FFFFFFF for run in runs]
    return Rows(jnp.asarray(table), jnp.asarray(sizes), jnp.asarray(ids, jnp.int32))


def recipe(config: Config, steps: int) -> Recipe:
    """The part of the settings that `segment` reads, for runs of `steps` steps."""
    return Recipe(
        rate=config.zoo_lr,
        steps=steps,
        batch=config.zoo_batch,
        snapshots=config.zoo_snapshots,
        head_scale=config.head_scale,
        seed=config.seed,
    )


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a short warm-up and cosine decay, gradients clipped to norm 1 in each run."""
    low = rate / 10
    schedule = optax.warmup_cosine_decay_schedule(low, rate, max(1, steps // 20), steps, low)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def snapshot_steps(snapshots: int, steps: int) -> np.ndarray:
    """[S] spaced steps of the last third of a run, the last one being its end."""
    return np.unique(np.linspace(steps * 2 // 3, steps, snapshots + 1).round().astype(int)[1:])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def segment(
    model: encoder.EncoderConfig,
    plan: Recipe,
    length: int,
    base: Base,
    rows: Rows,
    state: TrainState,
    start: jax.Array,
    factors: jax.Array | None = None,
) -> TrainState:
    """`length` steps of R runs, from step number `start` on.

    Args:
      factors: [R] each run's learning rate over the plan's; None: all have the plan's.
    """
    tuned = jl.lift(classifier(model, plan.head_scale))
    solver = optimizer(plan.rate, plan.steps)
    marks = jnp.asarray(snapshot_steps(plan.snapshots, plan.steps), jnp.int32)

    def loss(trainable: PyTree, drawn: jax.Array) -> jax.Array:
        one = base.adapter.replace(trainable=trainable)
        text, label, head = drawn[:, 0], drawn[:, 1], drawn[:, 2]
        logits = tuned(base.upper, one, base.hidden[text], base.mask[text], base.heads[head])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def one_run(trainable, moments, snaps, pool, size, run, step, factor):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), run), step)
        pick = jax.random.randint(key, (plan.batch,), 0, size)
        value, grads = jax.value_and_grad(loss)(trainable, pool[pick])
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = solver.update(grads, moments, trainable)
        if factor is not None:  # Adam's update is proportional to its rate
            updates = jax.tree.map(lambda u: factor * u, updates)
        trainable = optax.apply_updates(trainable, updates)
        hit = marks == step + 1  # [S]

        def keep(old, new):
            return jnp.where(hit.reshape(-1, *[1] * new.ndim), new[None], old)

        return trainable, moments, jax.tree.map(keep, snaps, trainable), value

    def body(carry: TrainState, step: jax.Array) -> tuple[TrainState, None]:
        axes = (0, 0, 0, 0, 0, 0, None, 0)
        out = jax.vmap(one_run, in_axes=axes)(*carry[:3], *rows, step, factors)
        return TrainState(out[0], out[1], out[2], carry.loss + out[3] / length), None

    state = state._replace(loss=jnp.zeros_like(state.loss))
    return jax.lax.scan(body, state, start + jnp.arange(length, dtype=jnp.int32))[0]


def shard(tree: PyTree, count: int) -> PyTree:
    """Spread the leading run axis over this process's devices when their number divides it."""
    devices = jax.local_devices()
    if len(devices) == 1 or count % len(devices):
        return tree
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("runs",), axis_types=auto, devices=devices)
    place = NamedSharding(mesh, PartitionSpec("runs"))
    return jax.tree.map(lambda x: jax.device_put(x, place), tree)


def train(
    world: World, runs: Sequence[Run], steps: int, folder: Path, bar: Progress
) -> dict[str, Any]:
    """Train R runs for `steps` steps, resuming from the newest checkpoint in `folder`.

    Returns {"snapshots": trainables [R, S, ...], "loss": [R]}.
    """
    config, plan = world.config, recipe(world.config, steps)
    trainable = start_points(world, runs)
    copies = len(snapshot_steps(plan.snapshots, steps))
    empty = jax.tree.map(lambda x: jnp.zeros((len(runs), copies, *x.shape[1:]), x.dtype), trainable)
    state = TrainState(
        trainable,
        jax.vmap(optimizer(plan.rate, steps).init)(trainable),
        empty,
        jnp.zeros(len(runs), jnp.float32),
    )
    done = 0
    kept = steps_kept(folder)
    if kept:
        done = int(kept[-1].name[5:])
        state = jax.tree.map(jnp.asarray, load_tree(kept[-1], state))
        bar.step(done * len(runs))
    rows, state = shard((pools(world, runs), state), len(runs))
    base = Base(
        world.upper,
        template(world, config.seed),
        world.hidden,
        world.mask,
        jnp.asarray(world.heads),
    )
    while done < steps:
        length = min(config.zoo_segment, steps - done)
        state = segment(world.model, plan, length, base, rows, state, jnp.int32(done))
        done += length
        save_tree(folder / f"step_{done}", state)
        for old in kept:
            shutil.rmtree(old, ignore_errors=True)
        kept = [folder / f"step_{done}"]
        loss = float(state.loss.mean())
        bar.step(length * len(runs), loss=loss)
        bar.curve(done, {f"loss/{folder.name}": loss})
    return {"snapshots": jax.tree.map(np.asarray, state.snapshots), "loss": np.asarray(state.loss)}
