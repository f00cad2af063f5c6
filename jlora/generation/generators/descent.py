r"""Minimisation of a generator's loss: one scan over steps, compiled once per loss and settings.

.. math:: \theta_{s+1} = \theta_s + \mathrm{solver}(\nabla_\theta\, L(\theta_s, \kappa_s)), \qquad
          \kappa_s = \mathrm{fold\_in}(\kappa, s)

What a step draws (rows, noise) it draws from its own key, so the result depends on the key alone.
"""

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.types import Tree

Loss = Callable[[Hashable, Tree, PRNGKeyArray, Tree], Array]  # (settings, params, key, data) -> []


def minimise(
    loss: Loss,
    solver: Callable[[Hashable], optax.GradientTransformation],
    settings: Hashable,
    params: Tree,
    key: PRNGKeyArray,
    data: Tree,
    steps: int,
) -> tuple[Tree, Float[np.ndarray, "steps"]]:
    """Trains parameters.

    Args:
      loss: (settings, params, key, data) -> scalar; a function of a module, so that a second call
        compiles nothing.
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
    loss: Loss, make: Callable, settings: Hashable, steps: int, params: Tree, key: Array, data: Tree
) -> tuple[Tree, Array]:
    solver = make(settings)

    def step(carry: tuple[Tree, Tree], number: Array) -> tuple[tuple[Tree, Tree], Array]:
        params, state = carry
        own = jax.random.fold_in(key, number)
        value, grads = jax.value_and_grad(lambda p: loss(settings, p, own, data))(params)
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = solver.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    with jax.numpy_dtype_promotion("standard"):
        start = params, solver.init(params)
    (params, _), losses = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return params, losses
