"""The faithful baseline: the paper's conditional latent DDPM with its 1-D convolutional U-Net.

T = 1000, linear beta, noise prediction, condition concatenated to the flat latent, no condition
dropout, ancestral sampling. One model per normalisation: over the zoo (`pdiff_global`) and with the
paper's per-task statistics (`pdiff_task`).

Deviates: U-Net widths are scaled by `--pdiff_width` (the paper: 64..512) and the ancestral steps
strided by `--pdiff_sample_steps` (the paper: all 1000) for CPUs; the condition is
a fixed random projection of the generator's (the paper: a CLIP text embedding); latents have unit
scale (generation fails with the raw ones: the authors' own advice), so x0 is clipped at +-4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.config import Config
from experiments.stages import conditions
from jlora.generation.diffusion import dit, loss, paths, unet1d

PyTree = Any
VARIANTS = ("pdiff_global", "pdiff_task")
WIDTH = 128  # numbers of the projected condition


class Data(NamedTuple):
    """Arrays of a training step."""

    z: jax.Array  # [n, S, L] latents
    task: jax.Array  # [n] position of their task
    stats: conditions.Scaling  # condition statistics
    table: conditions.Table  # the seen tasks
    embedding: jax.Array  # [N, E]
    projection: jax.Array  # [2 C E, WIDTH]


def objective() -> loss.Objective:
    """Noise prediction on the paper's discrete schedule."""
    return loss.Objective(paths.ddpm_linear(), "eps", times="discrete", drop=0.0)


def network(config: Config) -> unet1d.UNet1d:
    """The U-Net with widths w, 2w, 4w, 8w."""
    return unet1d.UNet1d(channels=tuple(config.pdiff_width * 2**i for i in range(4)))


def projection(config: Config, size: int) -> jax.Array:
    """[size, WIDTH] fixed random map with unit expected gain."""
    key = jax.random.fold_in(jax.random.key(config.seed), 103)
    return jax.random.normal(key, (size, WIDTH)) / jnp.sqrt(jnp.float32(size))


def solver() -> optax.GradientTransformation:
    """The paper's AdamW, 1e-3 and weight decay 1e-2."""
    return optax.adamw(1e-3, weight_decay=1e-2)


def value_of(config: Config) -> Callable:
    """The training loss as `value(params, data, key)`."""
    model = dit.bind(network(config))

    def value(params: PyTree, data: Data, key: jax.Array) -> tuple[jax.Array, dict]:
        k_row, k_cond, k_loss = jax.random.split(key, 3)
        rows = jax.random.randint(k_row, (config.pdiff_batch,), 0, data.z.shape[0])

        def draw(key, task):
            raw = conditions.random(data.table, data.embedding, key, task, config.examples)
            return conditions.scaled(data.stats, raw).reshape(1, -1) @ data.projection

        cond = jax.vmap(draw)(jax.random.split(k_cond, config.pdiff_batch), data.task[rows])
        total, _ = loss.diffusion_loss(model, params, k_loss, data.z[rows], cond, objective())
        return total, {}

    return value
