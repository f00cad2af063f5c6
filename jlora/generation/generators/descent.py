r"""Minimisation of a generator's loss: one scan over steps, compiled once per loss and settings.

.. math::
    \theta_{s+1} = \theta_s + \mathrm{solver}(\nabla_\theta\, L(\theta_s, \kappa_s, s / S)),
    \qquad \kappa_s = \mathrm{fold\_in}(\kappa, s)

S is the number of steps. What a step draws (rows, noise) it draws from its own key, so the result
depends on the key alone.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.types import Tree

S = TypeVar("S")  # hashable: hyper-parameters, a module of Flax, layouts, tuples of them
# (settings, params, key, share of the steps that are done, data) -> []
Loss = Callable[[S, Tree, PRNGKeyArray, Array, Tree], Array]


def minimise(
    loss: Loss[S],
    solver: Callable[[S], optax.GradientTransformation],
    settings: S,
    params: Tree,
    key: PRNGKeyArray,
    data: Tree,
    steps: int,
) -> tuple[Tree, Float[np.ndarray, "steps"]]:
    """Trains parameters.

    Args:
      loss: (settings, params, key, share of the steps that are done, data) -> scalar; a function
        of a module, so that a second call compiles nothing.
      solver: (settings) -> optimizer; likewise.
      settings: hashable, what both depend on: hyper-parameters, layouts.
      params: where training starts.
      key: of all steps.
      data: PyTree of arrays handed on to the loss.
      steps: how many, at least 1.

    Returns:
      The trained parameters, and the loss of each step.

    Raises:
      ValueError: no steps.
      FloatingPointError: the loss is not finite; the step is named.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    params, losses = _run(loss, solver, settings, steps, params, key, data)
    losses = np.asarray(losses)
    if not np.isfinite(losses).all():
        bad = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise FloatingPointError(f"the loss is not finite at step {bad} of {steps}")
    return params, losses


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    loss: Loss[S],
    make: Callable[[S], optax.GradientTransformation],
    settings: S,
    steps: int,
    params: Tree,
    key: Array,
    data: Tree,
) -> tuple[Tree, Array]:
    solver = make(settings)

    def step(carry: tuple[Tree, Tree], number: Array) -> tuple[tuple[Tree, Tree], Array]:
        params, state = carry
        own = jax.random.fold_in(key, number)
        done = number.astype(jnp.float32) / steps
        value, grads = jax.value_and_grad(lambda p: loss(settings, p, own, done, data))(params)
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = solver.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    with jax.numpy_dtype_promotion("standard"):
        start = params, solver.init(params)
    (params, _), losses = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return params, losses
