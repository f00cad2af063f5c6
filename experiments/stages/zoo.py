"""Stage `zoo`: LoRA adapters of many tasks and seeds, trained at once over one frozen base.

A run is one (task, seed). Runs are a vmapped axis, sharded over all devices when their number
divides the chunk: the base's matmuls see all runs' rows as one batch, only the adapter's own
products are per run. A chunk of runs is checkpointed every `zoo_segment` steps and its rows are
drawn from (seed, run, step), so a killed run goes on where it was and ends bitwise the same.
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
from experiments.stages.world import Rows, World, classifier
from experiments.workdir import Stage, StageError, load_tree, save_tree, write_json

PyTree = Any
POOL = 8192  # most training rows of a run; the multi-task run is drawn down to it


class Run(NamedTuple):
    """One adapter to train."""

    name: str  # unique: "<task>/<seed>" or "multitask"
    tasks: tuple[str, ...]  # its training tasks (one, or all seen ones)
    seed: int  # seeds zoo runs 0.. ; the reference run is the last one


class TrainState(NamedTuple):
    """State of a chunk of R runs."""

    trainable: PyTree  # leaves [R, ...]
    moments: PyTree  # optimizer state, leaves [R, ...]
    snapshots: PyTree  # leaves [R, S, ...]: copies taken at the snapshot steps
    loss: jax.Array  # [R] f32, mean training loss of the last segment


def plan(world: World) -> list[Run]:
    """Zoo runs: `zoo_seeds` a seen task, a reference seed for some, every held-out task once."""
    config = world.config
    seen = [t.name for t in world.tasks if t.level in ("seen", "user")]
    every = max(1, len(seen) // config.references) if config.references else 1
    marked = set(seen[::every][: config.references or None])
    runs = []
    for task in world.tasks:
        seeds = [config.zoo_seeds]
        if task.name in seen:
            seeds = range(config.zoo_seeds + (task.name in marked))
        runs += [Run(f"{task.name}/{s}", (task.name,), s) for s in seeds]
    return runs


def template(world: World, seed: int) -> jl.Adapter:
    """A fresh adapter of the task model; with `frozen_A` its `a` is the one all runs share."""
    config = world.config
    method = jl.LoRA(rank=config.rank, alpha=config.alpha, freeze_a=config.canonical == "frozen_A")
    apply = classifier(world.model, config.head_scale)
    rows = (world.hidden[:1], world.mask[:1], jnp.asarray(world.heads[:1]))
    return jl.init(jax.random.key(seed), apply, world.upper, *rows, methods={config.sites: method})


def start_points(world: World, runs: Sequence[Run]) -> PyTree:
    """Initial trainables [R, ...]: equal for all runs, or one draw a run when `a` is trained."""
    if world.config.canonical == "frozen_A":
        one = template(world, world.config.seed).trainable
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(runs), *x.shape)), one)
    seeds = [zlib.crc32(f"{world.config.seed}/{r.name}".encode()) & 0x7FFFFFFF for r in runs]
    trees = [template(world, s).trainable for s in seeds]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def pools(world: World, runs: Sequence[Run]) -> tuple[jax.Array, jax.Array]:
    """Training rows of each run: table [R, POOL, 3] (text, label, head) and sizes [R]."""
    order = {t.name: i for i, t in reversed(list(enumerate((*world.tasks, *world.pool))))}
    table = np.zeros((len(runs), POOL, 3), np.int32)
    sizes = np.zeros(len(runs), np.int32)
    for k, run in enumerate(runs):
        parts = []
        for name in run.tasks:
            rows: Rows = world.rows[name, "train"]
            head = np.full_like(rows.label, order[name])
            parts.append(np.stack([rows.index, rows.label, head], 1))
        part = np.concatenate(parts)
        if len(part) > POOL:
            part = part[np.random.default_rng(0).permutation(len(part))[:POOL]]
        table[k, : len(part)], sizes[k] = part, len(part)
    return jnp.asarray(table), jnp.asarray(sizes)


def optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam with a short warm-up and cosine decay, gradients clipped to norm 1 in each run."""
    rate = optax.warmup_cosine_decay_schedule(
        config.zoo_lr / 10, config.zoo_lr, max(1, steps // 20), steps, config.zoo_lr / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def snapshot_steps(config: Config, steps: int) -> np.ndarray:
    """[S] spaced steps of the last third of a run, the last one being its end."""
    return np.unique(
        np.linspace(steps * 2 // 3, steps, config.zoo_snapshots + 1).round().astype(int)[1:]
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def segment(
    model: Any,
    config: Config,
    steps: int,
    length: int,
    upper: PyTree,
    adapter: jl.Adapter,
    data: tuple[jax.Array, jax.Array, jax.Array],
    table: jax.Array,
    sizes: jax.Array,
    ids: jax.Array,
    state: TrainState,
    start: jax.Array,
) -> TrainState:
    """`length` steps of R runs. `data` = (hidden [N,t,d], mask [N,t], heads [n,2,d])."""
    tuned = jl.lift(classifier(model, config.head_scale))
    solver = optimizer(config, steps)
    marks = jnp.asarray(snapshot_steps(config, steps), jnp.int32)
    hidden, mask, heads = data

    def loss(trainable: PyTree, rows: jax.Array) -> jax.Array:
        one = adapter.replace(trainable=trainable)
        logits = tuned(upper, one, hidden[rows[:, 0]], mask[rows[:, 0]], heads[rows[:, 2]])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1]).mean()

    def one_run(trainable, moments, snaps, pool, size, run, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), run), step)
        pick = jax.random.randint(key, (config.zoo_batch,), 0, size)
        value, grads = jax.value_and_grad(loss)(trainable, pool[pick])
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = solver.update(grads, moments, trainable)
        trainable = optax.apply_updates(trainable, updates)
        hit = marks == step + 1  # [S]

        def keep(old, new):
            return jnp.where(hit.reshape(-1, *[1] * new.ndim), new[None], old)

        return trainable, moments, jax.tree.map(keep, snaps, trainable), value

    def body(carry: TrainState, step: jax.Array) -> tuple[TrainState, None]:
        out = jax.vmap(one_run, in_axes=(0, 0, 0, 0, 0, 0, None))(
            *carry[:3], table, sizes, ids, step
        )
        return TrainState(out[0], out[1], out[2], carry.loss + out[3] / length), None

    state = state._replace(loss=jnp.zeros_like(state.loss))
    return jax.lax.scan(body, state, start + jnp.arange(length, dtype=jnp.int32))[0]


def shard(tree: PyTree, count: int) -> PyTree:
    """Spread the leading run axis over all devices when they divide it."""
    devices = jax.device_count()
    if devices == 1 or count % devices:
        return tree
    mesh = jax.make_mesh((devices,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("runs"))
    return jax.tree.map(lambda x: jax.device_put(x, place), tree)


def train(
    world: World, runs: Sequence[Run], steps: int, folder: Path, bar: Progress
) -> dict[str, Any]:
    """Train R runs for `steps` steps, resuming from the newest checkpoint in `folder`.

    Returns {"snapshots": trainables [R, S, ...], "loss": [R]}.
    """
    config = world.config
    trainable = start_points(world, runs)
    copies = len(snapshot_steps(config, steps))
    empty = jax.tree.map(lambda x: jnp.zeros((len(runs), copies, *x.shape[1:]), x.dtype), trainable)
    state = TrainState(
        trainable,
        jax.vmap(optimizer(config, steps).init)(trainable),
        empty,
        jnp.zeros(len(runs), jnp.float32),
    )
    done = 0
    kept = sorted(folder.glob("step_*"), key=lambda p: int(p.name[5:])) if folder.is_dir() else []
    kept = [p for p in kept if p.name[5:].isdigit()]
    if kept:
        done = int(kept[-1].name[5:])
        state = jax.tree.map(jnp.asarray, load_tree(kept[-1], state))
        bar.step(done * len(runs))
    table, sizes = pools(world, runs)
    names = [zlib.crc32(r.name.encode()) & 0x7FFFFFFF for r in runs]
    ids = jnp.asarray(names, jnp.int32)
    table, sizes, ids, state = shard((table, sizes, ids, state), len(runs))
    adapter = template(world, config.seed)
    data = (world.hidden, world.mask, jnp.asarray(world.heads))
    key = _static(config)
    while done < steps:
        length = min(config.zoo_segment, steps - done)
        state = segment(
            world.model, key, steps, length, world.upper, adapter, data, table, sizes, ids, state,
            jnp.int32(done),
        )  # fmt: skip
        done += length
        save_tree(folder / f"step_{done}", state)
        for old in kept:
            shutil.rmtree(old, ignore_errors=True)
        kept = [folder / f"step_{done}"]
        loss = float(state.loss.mean())
        bar.step(length * len(runs), loss=loss)
        bar.curve(done, {f"loss/{folder.name}": loss})
    return {"snapshots": jax.tree.map(np.asarray, state.snapshots), "loss": np.asarray(state.loss)}


def _first(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: x[:count], tree)


def _static(config: Config) -> Config:
    """Only what `segment` reads, so that other settings do not recompile it."""
    names = "zoo_lr zoo_batch zoo_snapshots head_scale seed".split()
    return Config(**{n: getattr(config, n) for n in names})


def run(world: World, workdir: Path) -> Stage:
    """The whole stage: every chunk, then the multi-task adapter; returns the committed stage."""
    config = world.config
    stage = Stage(workdir, "zoo", config.key("zoo"))
    if stage.done:
        return stage
    folder = stage.open()
    runs = plan(world)
    size = min(config.zoo_chunk, len(runs))
    chunks = [runs[i : i + size] for i in range(0, len(runs), size)]
    seen = tuple(t.name for t in world.tasks if t.level in ("seen", "user"))
    multi_steps = 4 * config.zoo_steps
    total = len(chunks) * size * config.zoo_steps + multi_steps
    with Progress(workdir, "zoo", total, "run·step") as bar:
        for k, chunk in enumerate(chunks):
            target = folder / f"chunk_{k:03d}"
            if target.is_dir():
                bar.step(size * config.zoo_steps)
                continue
            # The last chunk is filled up with repeats, so that one compilation serves all.
            full = [*chunk, *[chunk[-1]] * (size - len(chunk))]
            out = train(world, full, config.zoo_steps, folder / f"work_{k:03d}", bar)
            save_tree(target, _first(out, len(chunk)))
            stage.discard(f"work_{k:03d}")
        if not (folder / "multitask").is_dir():
            out = train(world, [Run("multitask", seen, 0)], multi_steps, folder / "work_multi", bar)
            save_tree(folder / "multitask", out)
            stage.discard("work_multi")
    write_json(folder / "runs.json", [[r.name, list(r.tasks), r.seed] for r in runs])
    stage.commit({"runs": len(runs)})
    return stage


class Zoo(NamedTuple):
    """The trained adapters, as read back."""

    template: jl.Adapter  # frozen parts and sites; its trainable is a fresh start
    trainable: PyTree  # leaves [runs, S, ...] f32
    runs: tuple[Run, ...]  # in the order of the leading axis
    multitask: PyTree  # trainable of the one adapter trained on all seen tasks

    def of(self, task: str, seeds: Sequence[int]) -> np.ndarray:
        """Run positions of a task with one of these seeds."""
        hits = [i for i, r in enumerate(self.runs) if r.tasks == (task,) and r.seed in seeds]
        if not hits:
            raise StageError(f"the zoo has no run of task '{task}' with seed in {list(seeds)}")
        return np.asarray(hits)


def read(world: World, workdir: Path) -> Zoo:
    """Load the finished zoo. Raises StageError for damage, missing runs or NaN (named)."""
    stage = Stage(workdir, "zoo", world.config.key("zoo"))
    stage.verify()
    runs = tuple(plan(world))
    size = min(world.config.zoo_chunk, len(runs))
    parts = []
    for k, start in enumerate(range(0, len(runs), size)):
        like = _empty(world, len(runs[start : start + size]))
        parts.append(load_tree(stage.path / f"chunk_{k:03d}", like)["snapshots"])
    trainable = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        bad = ~np.isfinite(leaf.reshape(len(runs), -1)).all(1)
        if bad.any():
            where = runs[int(np.argmax(bad))].name
            raise StageError(
                f"{stage.path}: run '{where}' has NaN or infinity in {jax.tree_util.keystr(path)};"
                " lower --zoo_lr or delete the stage's folder and train it again"
            )
    multi = load_tree(stage.path / "multitask", _empty(world, 1))["snapshots"]
    last = jax.tree.map(lambda x: x[0, -1], multi)
    return Zoo(template(world, world.config.seed), trainable, runs, last)


def _empty(world: World, runs: int) -> dict[str, Any]:
    copies = len(snapshot_steps(world.config, world.config.zoo_steps))
    one = template(world, world.config.seed).trainable
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct((runs, copies, *x.shape), x.dtype), one)
    return {"snapshots": shape, "loss": jax.ShapeDtypeStruct((runs,), jnp.float32)}
