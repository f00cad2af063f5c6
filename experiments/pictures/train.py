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

from experiments import base_training
from experiments.finetuning.step import Report
from experiments.pictures.data import UNKNOWN, Pictures, scaled
from experiments.pictures.settings import Settings
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
    """Of the settings."""
    return base_training.optimizer(settings, "blocks", 0.0)


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
