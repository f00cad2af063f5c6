"""Stage `denoiser`: train our generator (two phases) and the paper's DDPM (two normalisations)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import codec, conditions, loop, ours, pdiff, prior
from experiments.stages.codec import Coded
from experiments.stages.world import World
from experiments.workdir import Stage, load_tree, save_tree, write_json
from jlora.generation.baselines import ridge
from jlora.generation.diffusion import dit, ema

PyTree = Any


class Trained(NamedTuple):
    """All generators."""

    params: PyTree  # averaged parameters of our DiT
    fixed: ours.Fixed  # what it stands on
    kernel: ridge.Kernel  # of the prior
    choice: ridge.Choice  # how it was chosen
    pdiff: dict[str, PyTree]  # variant -> U-Net parameters
    projection: jax.Array  # condition map of the U-Nets


def fixed_parts(world: World, coded: Coded) -> tuple[ours.Fixed, ridge.Choice]:
    """Everything of our generator that is computed, not trained."""
    config = world.config
    raw = conditions.canonical(world, coded.names)
    stats = conditions.scaling(raw)
    cond = conditions.scaled(stats, jnp.asarray(raw))
    z = codec.latents(coded, "ours")
    one = jax.nn.one_hot(coded.task, len(coded.names), dtype=z.dtype)
    soups = jnp.einsum("nk,nsl->ksl", one / one.sum(0)[None], z)
    mean, choice = prior.fit(cond, soups, config.prior)
    means = jax.vmap(lambda c: prior.mean(mean, choice.kernel, c, False))(cond)
    residual = z - means[coded.task]
    scale = jnp.sqrt(jnp.mean(residual**2, axis=(0, 2)))[:, None]
    names = list(coded.names)
    if config.task_pool == "pairs":
        names += [t.name for t in world.pool]
    fixed = ours.Fixed(
        residual=residual / scale[None],
        task=jnp.asarray(coded.task),
        scale=scale,
        prior=mean,
        stats=stats,
        fitted=coded.fitted["ours"],
        frozen=coded.template.frozen,
        table=conditions.table(world, names),
        embedding=jnp.asarray(world.embedding),
        upper=world.upper,
        hidden=world.hidden,
        mask=world.mask,
    )
    return fixed, choice


def train_ours(
    world: World, coded: Coded, fixed: ours.Fixed, kernel: ridge.Kernel, folder: Path, bar: Progress
) -> tuple[PyTree, dict[str, Any]]:
    """Both phases; returns the averaged parameters and the loss curves."""
    config = world.config
    key = jax.random.fold_in(jax.random.key(config.seed), 102)
    size = two(fixed.residual.shape[1:])
    shape = (4, fixed.stats.mean.shape[1])
    params = dit.init(ours.network(config), key, size, shape)
    curves = {}
    phases = [("diffusion", config.steps, config.lr, 50)]
    if config.task_steps:
        phases.append(("task", config.task_steps, config.task_lr, 10))
    for number, (label, steps, rate, chunk) in enumerate(phases):
        opt = ours.solver(rate, steps, config.ema)
        if label == "diffusion":
            value = ours.diffusion_value(config)
        else:
            pool = fixed.table.members.shape[0]
            value = ours.task_value(config, world, coded.template, coded, kernel, pool)
        state, curves[label] = loop.train(
            ours.step_of(value, opt),
            ours.TrainState(params, opt.init(params)),
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
    step: loop.Step,
    coded: Coded,
    fixed: ours.Fixed,
    variant: str,
    folder: Path,
    bar: Progress,
) -> tuple[PyTree, dict[str, Any]]:
    """One DDPM of the paper; `step` is the training step that both variants share."""
    key = jax.random.fold_in(jax.random.key(config.seed), 104 + pdiff.VARIANTS.index(variant))
    z = codec.latents(coded, variant)
    data = pdiff.Data(
        z, fixed.task, fixed.stats, fixed.table, fixed.embedding,
        pdiff.projection(config, int(np.prod(fixed.stats.mean.shape))),
    )  # fmt: skip
    params = dit.init(pdiff.network(config), key, two(z.shape[1:]), (1, pdiff.WIDTH))
    state, curves = loop.train(
        step,
        ours.TrainState(params, pdiff.solver().init(params)),
        data,
        jax.random.fold_in(key, 1),
        steps=config.pdiff_steps,
        chunk=25,
        save_every=100,
        folder=folder / variant,
        bar=bar,
        label=variant,
    )
    return state.params, curves


def two(shape: tuple[int, ...]) -> tuple[int, int]:
    """A latent's shape [S, L]."""
    length, width = shape
    return length, width


def run(world: World, coded: Coded, workdir: Path) -> Trained:
    """Train (or read) everything."""
    config = world.config
    stage = Stage(workdir, "denoiser", config.key("denoiser"))
    fixed, choice = fixed_parts(world, coded)
    size, shape = two(fixed.residual.shape[1:]), (4, fixed.stats.mean.shape[1])
    like = jax.eval_shape(
        lambda k: dit.init(ours.network(config), k, size, shape), jax.random.key(0)
    )
    proj = pdiff.projection(config, int(np.prod(fixed.stats.mean.shape)))
    if stage.done:
        stage.verify()
    folder, curves = stage.open(), {}
    nets, step = {}, ours.step_of(pdiff.value_of(config), pdiff.solver())
    total = config.steps + config.task_steps + 2 * config.pdiff_steps
    with Progress(workdir, "denoiser", total, "step", finished=stage.done) as bar:
        if not (folder / "ours").is_dir():
            work = folder / "work"
            params, curves = train_ours(world, coded, fixed, choice.kernel, work, bar)
            write_json(folder / "curves_ours.json", curves)
            save_tree(folder / "ours", params)
        else:
            bar.step(config.steps + config.task_steps)
        for variant in pdiff.VARIANTS:
            latent = two(jax.eval_shape(lambda v=variant: codec.latents(coded, v)).shape[1:])
            target = folder / variant
            net = pdiff.network(config)
            shaped = jax.eval_shape(
                lambda k, n=net, s=latent: dit.init(n, k, s, (1, pdiff.WIDTH)), jax.random.key(0)
            )
            if not target.is_dir():
                made, curves = train_pdiff(
                    config, step, coded, fixed, variant, folder / "work", bar
                )
                write_json(folder / f"curves_{variant}.json", curves)
                save_tree(target, made)
            else:
                bar.step(config.pdiff_steps)
            nets[variant] = jax.tree.map(jnp.asarray, load_tree(target, shaped))
    if not stage.done:
        stage.discard("work")
        stage.commit({"kernel": str(choice.kernel), "penalty": choice.penalty})
    params = jax.tree.map(jnp.asarray, load_tree(folder / "ours", like))
    return Trained(params, fixed, choice.kernel, choice, nets, proj)


def describe(trained: Trained) -> str:
    """The stage in a line."""
    count = sum(x.size for x in jax.tree.leaves(trained.params))
    return (
        f"a DiT of {count:,} numbers around a ridge prior ({trained.kernel.kind}, leave-one-task-"
        f"out error {trained.choice.error:.2f} of the mean adapter's); {len(trained.pdiff)} U-Nets"
    )
