r"""LoRA adapters of many styles, trained at once on the flow loss over one frozen base D.

.. math::
    L_i = \frac1B \sum_j \tfrac{1}{32 \cdot 32 \cdot 3} \| f_{W + \Delta_i}((1 - t_j) x_j
        + t_j \epsilon_j, t_j, c_j) - (\epsilon_j - x_j) \|^2, \qquad
    \Delta_i = \tfrac{\alpha}{r} A_i B_i

Symbols: x pictures of style i in -1 .. 1, t logistic-normal, c the name and the token of the run,
left out with probability ``drop``, A_i and B_i both trained. Every run starts from the same A and
from B = 0, so that adapters stay in comparable coordinates. The runs are a bank under `jax.vmap`;
rows, times and noise follow from seed, run and step alone, so a killed run ends with the same bits.
"""

from __future__ import annotations

import functools
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.pictures.data import scaled
from experiments.pictures.train import bind
from experiments.progress import Progress
from experiments.stages.zoo_training import optimizer
from experiments.styles.pictures import Drawn, World
from experiments.workdir import load_tree, save_tree, steps_kept
from jlora.generation.diffusion.loss import Objective, diffusion_loss
from jlora.generation.diffusion.paths import rectified_flow
from jlora.models import dit

PyTree = Any


class Run(NamedTuple):
    """One training run of the zoo."""

    name: str  # "style/seed": what its draws follow from
    style: str
    seed: int


class Recipe(NamedTuple):
    """What `segment` is compiled for."""

    steps: int  # of a run
    marks: tuple[int, ...]  # steps after which the adapter is kept
    rate: float  # peak
    batch: int
    drop: float
    seed: int


class Pool(NamedTuple):
    """The pictures of R runs."""

    pixels: jax.Array  # [R, n, 32, 32, 3] uint8, filled up with zeros
    words: jax.Array  # [R, n, k] int32
    size: jax.Array  # [R] int32, rows that are there
    run: jax.Array  # [R] int32, what the draws of a run follow from


class TrainState(NamedTuple):
    """All that changes."""

    trainable: PyTree  # leaves [R, ...]
    moments: PyTree  # of the optimizer
    snapshots: PyTree  # leaves [R, marks, ...]
    loss: jax.Array  # [R], mean over the last segment


def velocity(config: dit.DiTConfig) -> Callable[..., jax.Array]:
    """The base as `jl.lift` takes it: ``(params, z, t, condition, null)`` of one picture."""
    model = bind(config)
    return lambda params, z, t, condition, null: model(params, z, t, condition, null)[0]


@functools.lru_cache(maxsize=8)
def fresh(config: dit.DiTConfig, words: int, sites: str, method: jl.LoRA, seed: int) -> jl.Adapter:
    """An adapter of a base, before training.

    Args:
      config: the base's architecture.
      words: of the longest name.
      sites: regex of adapted kernels.
      method: at all of them.
      seed: of A.
    """
    params = jax.eval_shape(lambda: dit.init(jax.random.key(0), config))
    side = 8 * config.patch  # paths and shapes of kernels are the same for all sizes
    picture = jax.ShapeDtypeStruct((side, side, config.channels), jnp.float32)
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    name: Any = jax.ShapeDtypeStruct((words,), jnp.int32)
    condition = dit.Condition(number, name)
    time, null = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    return jl.init(
        jax.random.key(seed), velocity(config), params, picture, time, condition, null,
        methods={sites: method},
    )  # fmt: skip


def template(world: World, rank: int = 0) -> jl.Adapter:
    """The adapter that every run starts from.

    Args:
      world: its base and settings.
      rank: of adapters in the common basis, whose A is frozen; 0: that of the zoo, A trained.
    """
    s = world.settings
    kind = jl.LoRA(rank=rank, alpha=rank, freeze_a=True) if rank else jl.LoRA(s.rank, s.alpha)
    words = world.base.names["longest_name"]
    return fresh(world.base.config, words, re.compile(s.sites).pattern, kind, s.seed)


def pool(runs: Sequence[Run], drawn: Sequence[Drawn], most: int) -> Pool:
    """The pictures of some runs as one array each.

    Args:
      runs: their names.
      drawn: pictures of each.
      most: rows of each, so that few pictures need no compilation of their own.
    """

    def filled(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, most - len(x)), *[(0, 0)] * (x.ndim - 1)))

    ids = [zlib.crc32(run.name.encode()) & 0x7FFFFFFF for run in runs]
    return Pool(
        jnp.asarray(np.stack([filled(d.pixels) for d in drawn])),
        jnp.asarray(np.stack([filled(d.words) for d in drawn])),
        jnp.asarray([len(d.label) for d in drawn], jnp.int32),
        jnp.asarray(ids, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def segment(
    config: dit.DiTConfig, plan: Recipe, length: int, params: PyTree, adapter: jl.Adapter,
    token: jax.Array, given: Pool, state: TrainState, start: jax.Array,
) -> TrainState:  # fmt: skip
    """`length` steps of R runs, from step number `start` on.

    Args:
      config: the base's architecture.
      plan: of all runs.
      length: steps.
      params: of the base.
      adapter: sites and frozen parts.
      token: style by which pictures are asked for, int32 [].
      given: the pictures.
      state: before the first of these steps.
      start: number of the first step, int32 [].
    """
    tuned, rule = jl.lift(velocity(config)), optimizer(plan.rate, plan.steps)
    objective = Objective(rectified_flow(), "velocity", "logit_normal", drop=plan.drop)
    marks = jnp.asarray(plan.marks, jnp.int32)

    def model(trainable, z, t, condition, null):
        return tuned(params, adapter.replace(trainable=trainable), z, t, condition, null), None

    def one(trainable, moments, kept, pixels, words, size, run, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), run), step)
        pick, noise = jax.random.split(key)
        rows = jax.random.randint(pick, (plan.batch,), 0, size)
        x = (pixels[rows].astype(jnp.float32) - 127.5) / 127.5
        condition: Any = dit.Condition(jnp.full((plan.batch,), token), words[rows])
        value, grads = jax.value_and_grad(
            lambda p: diffusion_loss(model, p, noise, x, condition, objective)[0]
        )(trainable)
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = rule.update(grads, moments, trainable)
        trainable = optax.apply_updates(trainable, updates)
        hit = marks == step + 1

        def keep(old, new):
            return jnp.where(hit.reshape(-1, *[1] * new.ndim), new[None], old)

        return trainable, moments, jax.tree.map(keep, kept, trainable), value

    def body(carry: TrainState, step: jax.Array) -> tuple[TrainState, None]:
        axes = (0, 0, 0, 0, 0, 0, 0, None)
        out = jax.vmap(one, in_axes=axes)(*carry[:3], *given, step)
        return TrainState(out[0], out[1], out[2], carry.loss + out[3] / length), None

    state = state._replace(loss=jnp.zeros_like(state.loss))
    return jax.lax.scan(body, state, start + jnp.arange(length, dtype=jnp.int32))[0]


def initial(one: PyTree, plan: Recipe, runs: int) -> TrainState:
    """The state of so many runs before the first step, all of which start from one trainable."""
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (runs, *x.shape)), one)
    empty = jax.tree.map(lambda x: jnp.zeros((runs, len(plan.marks), *x.shape)), one)
    moments = jax.vmap(optimizer(plan.rate, plan.steps).init)(wide)
    return TrainState(wide, moments, empty, jnp.zeros(runs))


def train(
    world: World, plan: Recipe, runs: Sequence[Run], drawn: Sequence[Drawn], folder: Path,
    bar: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Trains R runs, resuming from the newest checkpoint in a folder.

    Args:
      world: base and settings.
      plan: of the runs.
      runs: what is trained.
      drawn: the pictures of each.
      folder: of checkpoints.
      bar: progress.

    Returns:
      {"snapshots": trainables [R, marks, ...], "loss": [R]}.

    Raises:
      FloatingPointError: a loss that is not finite, naming the run.
    """
    state, done = initial(template(world).trainable, plan, len(runs)), 0
    kept = steps_kept(folder)
    if kept:
        done = int(kept[-1].name[5:])
        state = jax.tree.map(jnp.asarray, load_tree(kept[-1], state))
        bar.step(done * len(runs))
    given, base = pool(runs, drawn, world.settings.pictures), world.base
    while done < plan.steps:
        length = min(world.settings.zoo_segment, plan.steps - done)
        state = segment(
            base.config, plan, length, base.params, template(world), jnp.int32(world.token), given,
            state, jnp.int32(done),
        )  # fmt: skip
        losses = np.asarray(state.loss)
        if not np.isfinite(losses).all():
            bad = runs[int(np.argmin(np.isfinite(losses)))].name
            raise FloatingPointError(f"{bad}: the loss is not finite by step {done + length}")
        done += length
        save_tree(folder / f"step_{done}", state)
        for old in kept:
            shutil.rmtree(old, ignore_errors=True)
        kept = [folder / f"step_{done}"]
        bar.step(length * len(runs), loss=float(losses.mean()))
        bar.curve(done, {f"loss/{folder.name}": float(losses.mean())})
    return {"snapshots": jax.tree.map(np.asarray, state.snapshots), "loss": np.asarray(state.loss)}


def empty(world: World, plan: Recipe, runs: int) -> dict[str, Any]:
    """Shapes of what `train` returns."""
    one = template(world).trainable  # outside of the trace: it is kept for later calls
    state = jax.eval_shape(lambda: initial(one, plan, runs))
    return {"snapshots": state.snapshots, "loss": state.loss}


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: dit.DiTConfig, params: PyTree, x: jax.Array, condition: Any, t: jax.Array,
            noise: jax.Array) -> jax.Array:  # fmt: skip
    def one(x, condition, t, noise):
        velocity = dit.forward(params, (1.0 - t) * x + t * noise, t, condition, config=config)
        return jnp.mean((velocity.velocity - (noise - x)) ** 2)

    return jax.vmap(lambda x, c, n: jax.vmap(one, (None, None, 0, 0))(x, c, t, n))(
        x, condition, noise
    )


def held_out_loss(world: World, params: PyTree, drawn: Drawn, times: int) -> np.ndarray:
    """Flow loss of pictures at fixed times with fixed noise, [n].

    Times are the middle quantiles of the law that is trained on; noise follows from the picture's
    place and the time's, so that adapters are compared on the same numbers.

    Args:
      world: the base's architecture, and the token.
      params: of the base, with an adapter merged or not.
      drawn: the pictures.
      times: per picture.
    """
    from scipy.special import ndtri

    t = 1 / (1 + np.exp(-ndtri((np.arange(times) + 0.5) / times)))
    n = len(drawn.label)
    shape = (n, times, *drawn.pixels.shape[1:])
    noise = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    condition = dit.Condition(jnp.full((n,), world.token, jnp.int32), jnp.asarray(drawn.words))
    losses = _losses(
        world.base.config, params, scaled(drawn.pixels), condition, t.astype(np.float32), noise
    )
    return np.asarray(losses, np.float64).mean(1)
