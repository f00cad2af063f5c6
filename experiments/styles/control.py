r"""A control branch of base D for edges: trained, and drawn with in the exact and the stale form.

.. math::
    e = \min\bigl(1, 2 \sqrt{(\partial_x Y)^2 + (\partial_y Y)^2}\bigr), \qquad
    L = \frac1B \sum_i \tfrac{1}{32 \cdot 32 \cdot 3}
        \| f((1 - t_i) x_i + t_i \epsilon_i, t_i, c_i, e_i) - (\epsilon_i - x_i) \|^2

Symbols: Y luma in 0 .. 1, differences of neighbours on both sides, e the control picture; the base
is frozen, the branch is that of `jlora.models.dit.control`. Guidance compares with the picture
without name and style and with the same edges.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.pictures.base_d import BaseD
from experiments.pictures.data import bytes_of
from experiments.stages.zoo_training import optimizer
from experiments.styles.distill import Recipe, Rows
from experiments.styles.transforms import luma
from jlora.generation.diffusion.guidance import combine
from jlora.generation.diffusion.loss import Objective, diffusion_loss
from jlora.generation.diffusion.paths import rectified_flow
from jlora.models import dit
from jlora.models.dit import control
from jlora.serving.control_service import Parts

GAIN = 2.0  # of edges


def edges(pixels: np.ndarray) -> np.ndarray:
    """e of pictures, float32 [n, h, w, 1].

    Args:
      pixels: uint8 [n, h, w, 3].
    """
    bright = luma(pixels.astype(np.float32) / np.float32(255))
    padded = np.pad(bright, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    return np.minimum(1.0, np.float32(GAIN) * np.sqrt(down**2 + across**2)).astype(np.float32)


@functools.cache
def _step(config: dit.DiTConfig, recipe: Recipe) -> Any:
    rule = optimizer(recipe.rate, recipe.steps)
    objective = Objective(rectified_flow(), "velocity", "logit_normal", drop=0.1)

    def step(own: Any, state: Any, params: Any, key: Any, x: Any, cond: Any) -> Any:
        def model(own: Any, z: Any, t: Any, cond: Any, null: Any) -> Any:
            return control.controlled(own, params, z, cond[1], t, cond[0], null, config), None

        value, grads = jax.value_and_grad(
            lambda own: diffusion_loss(model, own, key, x, cond, objective)[0]
        )(own)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = rule.update(grads, state, own)
        return optax.apply_updates(own, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def train(base: BaseD, recipe: Recipe, rows: Rows, seed: int) -> tuple[Any, np.ndarray]:
    """A branch, and the loss of each step.

    Args:
      base: the model, frozen.
      recipe: steps, batch and rate; the rest is for adapters.
      rows: pictures and conditions of a step.
      seed: of times and noise.

    Raises:
      FloatingPointError: a loss that is not finite.
    """
    own = jax.tree.map(jnp.array, control.init(jax.random.key(seed), base.params, base.config, 1))
    step, losses = _step(base.config, recipe), []
    state = optimizer(recipe.rate, recipe.steps).init(own)
    for number in range(recipe.steps):
        key, (x, condition) = jax.random.fold_in(jax.random.key(seed), number), rows(number)
        given: Any = (condition, edges(bytes_of(x)))
        own, state, value = step(own, state, base.params, key, x, given)
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is not finite at step {number}")
    return own, np.asarray(losses)


@functools.cache
def parts(config: dit.DiTConfig, steps: int, scale: float) -> Parts:
    """A step of Euler's method with guidance in three parts, for a batch of pictures.

    Weights of the base are (parameters, condition), those of the branch (branch, parameters,
    condition, edges); a condition is of all pictures.

    Args:
      config: the architecture.
      steps: of a picture.
      scale: of the guidance.
    """
    halves = np.asarray([True, False])

    def at(number: Any) -> Any:
        return 1.0 - jnp.asarray(number, jnp.float32) / steps

    def both(one: Any, *batched: Any) -> Any:
        """Over pictures, then over the halves of the guidance: [2, n, ...]."""
        return jax.vmap(lambda null: jax.vmap(lambda *x: one(null, *x))(*batched))(halves)

    @jax.jit
    def encode(given: Any, z: Any, number: Any) -> Any:
        params, condition = given
        one = lambda null, z, c: control.encode(params, z, at(number), c, null, config)  # noqa: E731
        return both(one, z, condition)

    @jax.jit
    def branch(given: Any, z: Any, number: Any) -> Any:
        own, params, condition, drawing = given

        def one(null: Any, z: Any, c: Any, e: Any) -> Any:
            return control.branch(own, params, z, e, at(number), c, null, config)

        return both(one, z, condition, drawing)

    @jax.jit
    def decode(given: Any, encoded: Any, residuals: Any, z: Any, number: Any) -> Any:
        one = functools.partial(control.decode, given[0], shape=z.shape[1:], config=config)
        null, asked = jax.vmap(jax.vmap(lambda e, r: one(e, r)))(encoded, residuals)
        return z - combine(null, asked, jnp.float32(scale)) / jnp.float32(steps)

    return Parts(encode, branch, decode)


def agreement(pixels: np.ndarray, drawing: np.ndarray) -> np.ndarray:
    """Correlation of the edges of pictures with those that were asked for, [n].

    Args:
      pixels: uint8 [n, h, w, 3].
      drawing: of `edges`.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (edges(pixels), drawing))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(size, 1e-12)  # a picture of one colour agrees with nothing
