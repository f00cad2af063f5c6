"""Training of `experiments.merging.vision`: the base, the frozen heads and the adapters.

Rows of all tasks are one table ``found = (images [n, N, side, side, 3], label [n, N], Heads)``.
R runs train in one program, vmapped over their adapters; the base is shared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.merging import vision_data as data_lib
from experiments.progress import Progress
from jlora.models.vit import Vit, VitConfig

PyTree = Any
NEVER = -1e30  # logit of a class that a task does not have
VIT = VitConfig(side=32, patch=8, layers=3, width=96, heads=4, ffn=192)


@dataclasses.dataclass(frozen=True)
class Spec:
    """All settings of pre-training, heads and adapters."""

    vit: VitConfig = VIT
    pictures: int = 16  # of each class of pre-training, six times as many of characters
    base_steps: int = 2500
    base_batch: int = 128
    base_lr: float = 1.5e-3
    sites: str = r"(attention/(query|key|value|out)|ffn/(up|down))/kernel"
    train_rows: int = 4000  # of each task
    head_scale: float = 1.0
    ridge: float = 0.01  # of the covariance of the heads, times its mean variance
    tasks: tuple[str, ...] = (  # neighbours make the merges of less than all
        *("mnist", "letter", "tone", "face", "category", "lower", "digits8", "photo"),
    )
    steps: int = 600  # of an adapter; four times as many of the one of all tasks
    batch: int = 32
    lr: float = 1e-2
    segment: int = 25  # steps between two looks at the bar
    seeds: int = 2
    made_up: int = 0  # tasks of made-up pictures instead


class Heads(NamedTuple):
    """Frozen heads of n tasks; K is the largest number of classes."""

    prototype: jax.Array  # [n, K, d] f32: h, zero where there is no such class
    offset: jax.Array  # [n, K] f32: -h . mu, or -1e30


class Runs(NamedTuple):
    """What R runs carry through training."""

    trainable: PyTree  # leaves [R, ...]
    moments: PyTree
    loss: jax.Array  # [R] mean of the segment


def features(vit: VitConfig, params: PyTree, images: jax.Array) -> jax.Array:
    """uint8 [b, side, side, 3] -> mean last state [b, d]."""
    x = images.astype(jnp.float32) / 127.5 - 1.0
    return Vit(vit).apply({"params": params}, x).mean(1)


@functools.cache
def classifier(vit: VitConfig, scale: float) -> Callable[..., jax.Array]:
    """(params, images [b, ...], prototype [b, K, d], offset [b, K]) -> logits [b, K]."""

    def apply(params: PyTree, images: jax.Array, prototype: jax.Array, offset: jax.Array):
        f = features(vit, params, images)
        return scale * (jnp.einsum("bkd,bd->bk", prototype, f) + offset)

    return apply


def _solver(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        rate / 10, rate, max(1, steps // 20), steps, rate / 50
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))


def _update(solver, grads, moments, trainable):
    # optax raises Python floats to integer counters, which strict promotion would forbid.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = solver.update(grads, moments, trainable)
    return optax.apply_updates(trainable, updates), moments


def shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each picture [b, side, side, 3] moved by up to two pixels, around the edge."""
    moves = jax.random.randint(key, (len(images), 2), -2, 3)
    return jax.vmap(lambda x, m: jnp.roll(x, (m[0], m[1]), (0, 1)))(images, moves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _base_segment(spec: Spec, length: int, state: Runs, images, label, start):
    solver = _solver(spec.base_lr, spec.base_steps)

    def loss(tree: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = features(spec.vit, tree["vit"], x) @ tree["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def body(state: Runs, step: jax.Array) -> tuple[Runs, None]:
        key = jax.random.fold_in(jax.random.key(0), step)
        which, where = jax.random.split(key)
        pick = jax.random.randint(which, (spec.base_batch,), 0, len(label))
        moved = shifted(where, images[pick])
        value, grads = jax.value_and_grad(loss)(state.trainable, moved, label[pick])
        new, moments = _update(solver, grads, state.moments, state.trainable)
        return Runs(new, moments, state.loss + value / length), None

    state = state._replace(loss=jnp.zeros_like(state.loss))
    return jax.lax.scan(body, state, start + jnp.arange(length, dtype=jnp.int32))[0]


def pre_train(spec: Spec, pictures: data_lib.Split, workdir: Path) -> PyTree:
    """The parameters of the base."""
    classes = int(pictures.label.max()) + 1
    images, label = jnp.asarray(pictures.images), jnp.asarray(pictures.label)
    keys = jax.random.split(jax.random.key(0))
    sample = jnp.zeros((1, spec.vit.side, spec.vit.side, 3))
    tree = {
        "vit": Vit(spec.vit).init(keys[0], sample)["params"],
        "head": 0.02 * jax.random.normal(keys[1], (spec.vit.width, classes)),
    }
    state = Runs(tree, _solver(spec.base_lr, spec.base_steps).init(tree), jnp.zeros(()))
    with Progress(workdir, "base", spec.base_steps, "step") as bar:
        for done in range(0, spec.base_steps, spec.segment):
            length = min(spec.segment, spec.base_steps - done)
            state = _base_segment(spec, length, state, images, label, jnp.int32(done))
            bar.step(length, loss=float(state.loss))
            bar.curve(done + length, {"loss/base": float(state.loss)})
    return state.trainable["vit"]


def heads(spec: Spec, base: PyTree, tasks: Sequence[data_lib.Task]) -> Heads:
    """Whitened prototypes of each task's training rows."""
    most = max(t.classes for t in tasks)
    run = jax.jit(functools.partial(features, spec.vit))
    prototype = np.zeros((len(tasks), most, spec.vit.width), np.float32)
    offset = np.full((len(tasks), most), NEVER, np.float32)
    for n, task in enumerate(tasks):
        images, label = task.splits["train"]
        f = np.asarray(run(base, jnp.asarray(images)), np.float64)
        means = np.stack([f[label == k].mean(0) for k in range(task.classes)])
        middle = means.mean(0)
        rest = f - means[label]
        cov = rest.T @ rest / len(f)
        value, vector = np.linalg.eigh(
            cov + spec.ridge * np.trace(cov) / len(cov) * np.eye(len(cov))
        )
        white = (vector / np.sqrt(value)) @ vector.T  # C^-1/2
        far = (means - middle) @ white
        unit = far / np.linalg.norm(far, axis=1, keepdims=True) @ white
        prototype[n, : task.classes], offset[n, : task.classes] = unit, -unit @ middle
    return Heads(jnp.asarray(prototype), jnp.asarray(offset))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _segment(spec: Spec, steps: int, length: int, base, adapter, state, data, pools, keys, start):
    """`length` of `steps` steps of R runs; a row is of any task of the run's pool [R, P]."""
    tuned = jl.lift(classifier(spec.vit, spec.head_scale))
    solver = _solver(spec.lr, steps)
    images, label, head = data  # [n, N, ...], [n, N], Heads

    def loss(trainable, x, y, h):
        logits = tuned(base, adapter.replace(trainable=trainable), x, *h)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def one(trainable, moments, pool, key, step):
        which, row, where = jax.random.split(jax.random.fold_in(key, step), 3)
        task = pool[jax.random.randint(which, (spec.batch,), 0, len(pool))]
        at = jax.random.randint(row, (spec.batch,), 0, label.shape[1])
        h = jax.tree.map(lambda x: x[task], head)
        x = shifted(where, images[task, at])
        value, grads = jax.value_and_grad(loss)(trainable, x, label[task, at], h)
        return *_update(solver, grads, moments, trainable), value

    def body(state: Runs, step: jax.Array) -> tuple[Runs, None]:
        new, moments, value = jax.vmap(one, (0, 0, 0, 0, None))(
            state.trainable, state.moments, pools, keys, step
        )
        return Runs(new, moments, state.loss + value / length), None

    state = state._replace(loss=jnp.zeros_like(state.loss))
    return jax.lax.scan(body, state, start + jnp.arange(length, dtype=jnp.int32))[0]


def fresh(
    spec: Spec, rank: int, base: PyTree, data: tuple, pools: np.ndarray, seeds: Sequence[int]
) -> jl.Adapter:
    """R untrained adapters, leaves [R, ...], each drawn for its (first task, seed)."""
    images, _, head = data
    sample = (images[0, :1], *(x[:1] for x in head))
    key = jax.random.key(rank)
    starts = [
        jl.init(jax.random.fold_in(key, 1000 * s + int(p[0])), classifier(spec.vit, 1.0), base,
                *sample, methods={spec.sites: jl.LoRA(rank=rank, alpha=float(rank))})
        for p, s in zip(pools, seeds, strict=True)
    ]  # fmt: skip
    return starts[0].replace(
        trainable=jax.tree.map(lambda *x: jnp.stack(x), *[a.trainable for a in starts])
    )


def adapt(
    spec: Spec, start: jl.Adapter, base: PyTree, data: tuple, pools: np.ndarray,
    seeds: Sequence[int], steps: int, workdir: Path, name: str,
) -> PyTree:  # fmt: skip
    """Trained leaves [R, ...]; run r draws its rows from the tasks of row r of `pools` [R, P]."""
    moments = jax.vmap(_solver(spec.lr, steps).init)(start.trainable)
    state = Runs(start.trainable, moments, jnp.zeros(len(pools)))
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(0), s))(
        jnp.asarray(seeds, jnp.int32)
    )
    with Progress(workdir, name, steps * len(pools), "run·step") as bar:
        for done in range(0, steps, spec.segment):
            length = min(spec.segment, steps - done)
            state = _segment(spec, steps, length, base, start, state, data,
                             jnp.asarray(pools), keys, jnp.int32(done))  # fmt: skip
            loss = float(state.loss.mean())
            bar.step(length * len(pools), loss=loss)
            bar.curve(done + length, {f"loss/{name}": loss})
    return state.trainable
