"""Stage `denoiser`: train the generator (two phases) and the paper's DDPM (two normalisations)."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import codec, conditions, generator, pdiff, train_loop
from experiments.stages.codec import Encoded
from experiments.stages.world import World
from experiments.workdir import load_tree, save_tree, write_json
from jlora.generation.baselines import ridge
from jlora.generation.diffusion import dit, ema
from jlora.generation.generators import prior

PyTree = Any


class Trained(NamedTuple):
    """The trained generator and the paper's two models."""

    params: PyTree  # averaged parameters of the generator's DiT
    fixed: generator.Fixed  # arrays that the generator reads
    kernel: ridge.Kernel  # of the prior
    choice: ridge.Choice  # how it was chosen
    pdiff: dict[str, PyTree]  # variant -> U-Net parameters
    projection: jax.Array  # condition map of the U-Nets


def fixed_parts(world: World, encoded: Encoded) -> tuple[generator.Fixed, ridge.Choice]:
    """Everything of the generator that is computed, not trained."""
    config = world.config
    raw = conditions.canonical(world, encoded.names)
    stats = conditions.scaling(raw)
    cond = conditions.scaled(stats, jnp.asarray(raw))
    z = codec.latents(encoded, "generator")
    one = jax.nn.one_hot(encoded.task, len(encoded.names), dtype=z.dtype)
    soups = jnp.einsum("nk,nsl->ksl", one / one.sum(0)[None], z)
    mean, choice = prior.fit(cond, soups, config.prior)
    means = jax.vmap(lambda c: prior.mean(mean, choice.kernel, c, False))(cond)
    residual = z - means[encoded.task]
    scale = jnp.sqrt(jnp.mean(residual**2, axis=(0, 2)))[:, None]
    names = list(encoded.names)
    if config.task_pool == "pairs":
        names += [t.name for t in world.pool]
    fixed = generator.Fixed(
        residual=residual / scale[None],
        task=jnp.asarray(encoded.task),
        scale=scale,
        prior=mean,
        stats=stats,
        fitted=encoded.fitted["generator"],
        frozen=encoded.template.frozen,
        table=conditions.table(world, names),
        embedding=jnp.asarray(world.embedding),
        upper=world.upper,
        hidden=world.hidden,
        mask=world.mask,
    )
    return fixed, choice


def train_generator(
    world: World,
    encoded: Encoded,
    fixed: generator.Fixed,
    kernel: ridge.Kernel,
    folder: Path,
    bar: Progress,
) -> tuple[PyTree, dict[str, Any]]:
    """Both phases; returns the averaged parameters and the loss curves."""
    config = world.config
    key = jax.random.fold_in(jax.random.key(config.seed), 102)
    size = _pair(fixed.residual.shape[1:])
    shape = _pair(fixed.stats.mean.shape)
    params = dit.init(generator.network(config), key, size, shape)
    curves = {}
    phases = [("diffusion", config.steps, config.lr, 50)]
    if config.task_steps:
        phases.append(("task", config.task_steps, config.task_lr, 10))
    for number, (label, steps, rate, chunk) in enumerate(phases):
        opt = generator.solver(rate, steps, config.ema)
        if label == "diffusion":
            value = generator.diffusion_value(config)
        else:
            pool = fixed.table.members.shape[0]
            value = generator.task_value(config, world, encoded.template, encoded, kernel, pool)
        state, curves[label] = train_loop.train(
            generator.step_of(value, opt),
            generator.TrainState(params, opt.init(params)),
            fixed,
            jax.random.fold_in(key, number + 1),
            steps=steps,
            chunk=chunk,
            save_every=250 if label == "diffusion" else 50,
            folder=folder / label,
            bar=bar,
            label=label,
        )
        params = ema.averaged(state.solver)
    return params, curves


def train_pdiff(
    config: Config,
    step: train_loop.Step,
    encoded: Encoded,
    fixed: generator.Fixed,
    variant: str,
    folder: Path,
    bar: Progress,
) -> tuple[PyTree, dict[str, Any]]:
    """One DDPM of the paper; `step` is the training step that both variants share."""
    key = jax.random.fold_in(jax.random.key(config.seed), 104 + pdiff.VARIANTS.index(variant))
    z = codec.latents(encoded, variant)
    data = pdiff.Data(
        z, fixed.task, fixed.stats, fixed.table, fixed.embedding,
        pdiff.projection(config, int(np.prod(fixed.stats.mean.shape))),
    )  # fmt: skip
    params = dit.init(pdiff.network(config), key, _pair(z.shape[1:]), (1, pdiff.WIDTH))
    state, curves = train_loop.train(
        step,
        generator.TrainState(params, pdiff.solver().init(params)),
        data,
        jax.random.fold_in(key, 1),
        steps=config.pdiff_steps,
        chunk=25,
        save_every=100,
        folder=folder,
        bar=bar,
        label=variant,
    )
    return state.params, curves


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    """A latent's shape [S, L]."""
    length, width = shape
    return length, width


class Prepared(NamedTuple):
    """What is computed before training, and the training step that both DDPMs share."""

    fixed: generator.Fixed  # arrays that the generator reads
    choice: ridge.Choice  # of the prior's kernel and penalty
    step: train_loop.Step  # shared, so that it is compiled once


def prepare(context: Context) -> Prepared:
    """The computed parts."""
    fixed, choice = fixed_parts(context.products["data"], context.products["codec"])
    step = generator.step_of(pdiff.value_of(context.config), pdiff.solver())
    return Prepared(fixed, choice, step)


def pieces(context: Context, prepared: Prepared) -> list[Piece]:
    """The generator and the two DDPMs."""
    config = context.config
    make = functools.partial(_train_generator, context, prepared)
    out = [Piece("generator", config.steps + config.task_steps, make)]
    for variant in pdiff.VARIANTS:
        make = functools.partial(_train_pdiff, context, prepared, variant)
        out.append(Piece(variant, config.pdiff_steps, make))
    return out


def _train_generator(context: Context, prepared: Prepared, folder: Path, bar: Progress) -> None:
    world, encoded = context.products["data"], context.products["codec"]
    kernel, work = prepared.choice.kernel, folder / "work_generator"
    params, curves = train_generator(world, encoded, prepared.fixed, kernel, work, bar)
    _keep(folder, "generator", params, curves)


def _train_pdiff(
    context: Context, prepared: Prepared, variant: str, folder: Path, bar: Progress
) -> None:
    encoded, work = context.products["codec"], folder / f"work_{variant}"
    params, curves = train_pdiff(
        context.config, prepared.step, encoded, prepared.fixed, variant, work, bar
    )
    _keep(folder, variant, params, curves)


def _keep(folder: Path, name: str, params: PyTree, curves: dict[str, Any]) -> None:
    # Curves before the checkpoint, whose presence says that the piece is finished.
    write_json(folder / f"curves_{name}.json", curves)
    save_tree(folder / name, params)
    shutil.rmtree(folder / f"work_{name}")


def read(context: Context, prepared: Prepared, done: Done) -> Trained:
    """The three models, and what the generator reads."""
    config, encoded, fixed = context.config, context.products["codec"], prepared.fixed
    size = int(np.prod(fixed.stats.mean.shape))
    shape = _pair(fixed.stats.mean.shape)
    params = _load(
        done.path / "generator", generator.network(config), _pair(fixed.residual.shape[1:]), shape
    )
    nets = {}
    for variant in pdiff.VARIANTS:
        latent = _pair(jax.eval_shape(lambda v=variant: codec.latents(encoded, v)).shape[1:])
        net = pdiff.network(config)
        nets[variant] = _load(done.path / variant, net, latent, (1, pdiff.WIDTH))
    kernel = prepared.choice.kernel
    return Trained(params, fixed, kernel, prepared.choice, nets, pdiff.projection(config, size))


def _load(path: Path, net: Any, latent: tuple[int, int], cond: tuple[int, int]) -> PyTree:
    like = jax.eval_shape(lambda key: dit.init(net, key, latent, cond), jax.random.key(0))
    return jax.tree.map(jnp.asarray, load_tree(path, like))


def describe(trained: Trained) -> str:
    """The trained models in one line."""
    count = sum(x.size for x in jax.tree.leaves(trained.params))
    return (
        f"a DiT of {count:,} numbers around a ridge prior ({trained.kernel.kind}, leave-one-task-"
        f"out error {trained.choice.error:.2f} of the mean adapter's); {len(trained.pdiff)} U-Nets"
    )


STAGE = Stage(
    name="denoiser",
    inputs=("data", "codec"),
    unit="step",
    prepare=prepare,
    pieces=pieces,
    finish=lambda context, prepared, folder: {
        "kernel": str(prepared.choice.kernel),
        "penalty": prepared.choice.penalty,
    },
    read=read,
    describe=describe,
)
