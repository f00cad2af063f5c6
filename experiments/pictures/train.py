r"""One step of training a DiT on pixels by the rectified flow, and the rows that a step reads.

.. math::
    L = \frac1B \sum_i \tfrac{1}{32 \cdot 32 \cdot 3}
        \| f((1 - t_i) x_i + t_i \epsilon_i, t_i, c_i) - (\epsilon_i - x_i) \|^2, \qquad
    t_i = \mathrm{sigmoid}(n_i)

Symbols: x pictures in -1 .. 1, n and :math:`\epsilon` standard normal, c style and name, left out
with probability ``drop``. Every style is as frequent as any other, whatever its number of pictures.
The state of the optimizer holds the moving average of the parameters, of which samples are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array

from experiments.finetuning.step import Report
from experiments.pictures.data import UNKNOWN, Pictures, scaled
from experiments.pictures.settings import Settings
from jlora.generation.diffusion import ema
from jlora.generation.diffusion.loss import Objective, diffusion_loss
from jlora.generation.diffusion.paths import rectified_flow
from jlora.models import dit


class State(NamedTuple):
    """All that changes during a run."""

    step: Any  # int32 []: steps done
    params: Any  # of the DiT
    optimizer: Any  # its state, with the averaged parameters


def architecture(settings: Settings, pictures: Pictures) -> dit.DiTConfig:
    """The architecture for the words of some pictures."""
    return settings.config(len(pictures.vocabulary) + UNKNOWN + 1)


def bind(config: dit.DiTConfig) -> Callable[..., tuple[Array, None]]:
    """The DiT as the losses and samplers of `jlora.generation.diffusion` call a denoiser."""

    def model(params: Any, z: Array, t: Array, condition: dit.Condition, null: Array) -> Any:
        return dit.forward(params, z, t, condition, null, config=config).velocity, None

    return model


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks (AdamW for all else, or for all), then the average.

    Rates rise, stay, and fall to zero by the end, so that a run of more steps has the same start.
    """
    warmup = max(1, round(settings.warmup * settings.steps))
    fall = max(1, round(settings.decay * settings.steps))

    def rate(peak: float) -> optax.Schedule:
        flat = max(0, settings.steps - warmup - fall)
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
            adam_learning_rate=rate(settings.lr), muon_weight_dimension_numbers=_matrices,
        )  # fmt: skip
    clip = optax.clip_by_global_norm(settings.clip)
    return optax.chain(clip, rule, ema.average(settings.ema))


def _matrices(params: Any) -> Any:
    """Kernels of blocks are stacked (axis 0 is the block, then in, out); None: AdamW."""
    kernel = optax.contrib.MuonDimensionNumbers(1, 2)

    def one(path: Any, _: Any) -> Any:
        name = jax.tree_util.keystr(path)
        return kernel if "blocks" in name and "kernel" in name else None

    return jax.tree_util.tree_map_with_path(one, params)


def initial(settings: Settings, config: dit.DiTConfig) -> State:
    """The state before the first step."""
    params = dit.init(jax.random.key(settings.seed), config)
    return State(jnp.int32(0), params, optimizer(settings).init(params))


def rows(pictures: Pictures, settings: Settings, step: int) -> np.ndarray:
    """The pictures of a step, int64 [batch]; they follow from seed and step alone."""
    random = np.random.default_rng([settings.seed, step])
    own = [
        pictures.train[pictures.style[pictures.train] == n + 1] for n in range(len(pictures.styles))
    ]
    styles = random.integers(0, len(own), settings.batch)
    places = random.random(settings.batch)
    return np.asarray([own[s][int(p * len(own[s]))] for s, p in zip(styles, places, strict=True)])


def batch(pictures: Pictures, chosen: np.ndarray) -> tuple[np.ndarray, dit.Condition]:
    """Pictures as the model reads them, and what they are."""
    condition = dit.Condition(
        jnp.asarray(pictures.style[chosen]), jnp.asarray(pictures.words[chosen])
    )
    return scaled(pictures.pixels[chosen]), condition


def make(
    settings: Settings, config: dit.DiTConfig
) -> Callable[[State, Array, dit.Condition], tuple[State, Report]]:
    """The jitted step ``(state, pictures, conditions) -> (state, report)``.

    Times, noise and dropped conditions follow from seed and step; the state's buffers are donated.
    """
    rule, model = optimizer(settings), bind(config)
    objective = Objective(rectified_flow(), "velocity", "logit_normal", drop=settings.drop)

    def step(state: State, pictures: Array, condition: dit.Condition) -> tuple[State, Report]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)

        def mean(params: Any) -> Array:
            conditions: Any = condition  # a tree of arrays of the batch
            return diffusion_loss(model, params, key, pictures, conditions, objective)[0]

        value, grads = jax.value_and_grad(mean)(state.params)
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = rule.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        report = Report(value, norm, jnp.isfinite(value) & jnp.isfinite(norm))
        return State(state.step + 1, params, inner), report

    return jax.jit(step, donate_argnums=0)
