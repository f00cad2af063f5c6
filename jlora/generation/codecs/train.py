r"""The training loop of the autoencoder codecs: jitted scans over chunks of steps.

Step s draws its minibatch and its noise from fold_in(key, s), so a run that is resumed from any
saved `TrainState` takes the steps an undisturbed one would have taken.

Deviates: nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jlora.types import Dynamic, Tree

Metrics = dict[str, Dynamic]
Callback = Callable[["TrainState", Metrics], None]


class TrainState(NamedTuple):
    """What is needed to go on; a PyTree of arrays."""

    params: Tree  # parameters of the autoencoder
    opt_state: optax.OptState  # moments and schedule position
    step: Array  # int32 [], steps taken


class Problem(NamedTuple):
    """What is minimised; hashable, so that two fits of one kind and shape are compiled once."""

    model: nn.Module  # autoencoder, unbound
    loss: Callable  # (model, view, params, key, x [batch, ...]) -> (scalar, metrics of scalars)
    optimizer: Callable  # (model) -> optax transformation; is given the loss as `value`


class TrainInfo(NamedTuple):
    """What the fit of an autoencoder reports."""

    train: TrainState  # where it ended: give it back as `resume` to train on with more steps
    history: dict[str, np.ndarray]  # metric -> [steps taken in this call]


def draw_params(key: PRNGKeyArray, model: nn.Module, *args: Shaped[Array, "..."]) -> Tree:
    """Initial parameters of a model from a single draw.

    A layer with a kernel gets kernel and bias uniform in +-1 / sqrt(fan-in), any other leaf is
    uniform with unit variance. One draw for all: with a draw per leaf, as Flax does it, XLA takes
    longer to compile the generator of the parameters than these codecs take to train.

    Args:
      key: PRNG key.
      model: Flax module, whose own initialisers are not used.
      args: what the module is called with (shapes only).

    Returns:
      The parameters, float32.
    """
    shapes = jax.eval_shape(model.init, key, *args)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    bounds = jax.tree.leaves(_bounds(shapes))
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1.0), ends[:-1])
    params = [u.reshape(s.shape) * c for u, s, c in zip(parts, leaves, bounds, strict=True)]
    return jax.tree.unflatten(tree, params)


def _bounds(shapes: Tree) -> Tree:
    layer = 3.0**0.5
    if "kernel" in shapes:
        layer = math.prod(shapes["kernel"].shape[:-1]) ** -0.5
    return {k: _bounds(v) if isinstance(v, dict) else layer for k, v in shapes.items()}


@functools.partial(jax.jit, static_argnames=("problem", "size", "length"))
def _run(
    problem: Problem, size: int, length: int, state: TrainState, view: Tree, x: Array, key: Array
) -> tuple[TrainState, Metrics]:
    optimizer = optax.with_extra_args_support(problem.optimizer(problem.model))

    def step(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        pick, noise = jax.random.split(jax.random.fold_in(key, state.step))
        rows = x if size == x.shape[0] else x[jax.random.permutation(pick, x.shape[0])[:size]]
        gradient = jax.value_and_grad(
            lambda params: problem.loss(problem.model, view, params, noise, rows), has_aux=True
        )
        (value, metrics), grads = gradient(state.params)
        # optax raises Python floats to integer counters, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics | {"loss": value}

    return jax.lax.scan(step, state, None, length)


def train(
    problem: Problem,
    params: Tree,
    x: Float[Array, "n ..."],
    key: PRNGKeyArray,
    *,
    steps: int,
    batch: int,
    chunk: int,
    view: Tree = None,
    callback: Callback | None = None,
    resume: TrainState | None = None,
) -> TrainInfo:
    """Minimises a loss over minibatches drawn without replacement within a step.

    Args:
      problem: model, loss and optimizer.
      params: initial parameters (ignored with `resume`).
      x: [n, ...] training examples.
      key: PRNG key of the whole run.
      steps: total steps, including those already taken by `resume`.
      batch: minibatch size; more than n is n.
      chunk: steps in one jitted scan.
      view: PyTree handed on to the loss.
      callback: called after each chunk with the state and the metrics [chunk] as numpy arrays.
      resume: a state to go on from.

    Returns:
      `TrainInfo`.

    Raises:
      ValueError: no steps, chunks or batch.
      FloatingPointError: the loss is not finite (names the step).
    """
    if min(steps, batch, chunk) < 1:
        raise ValueError(f"steps, batch and chunk must be positive, got {steps}, {batch}, {chunk}")
    state, size = resume, min(batch, x.shape[0])
    if state is None:
        opt_state = problem.optimizer(problem.model).init(params)
        state = TrainState(params, opt_state, jnp.zeros((), jnp.int32))
    history: list[Metrics] = []
    while (at := int(state.step)) < steps:
        state, metrics = _run(problem, size, min(chunk, steps - at), state, view, x, key)
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        bad = np.flatnonzero(~np.isfinite(metrics["loss"]))
        if bad.size:
            raise FloatingPointError(f"codec loss is not finite at step {at + int(bad[0])}")
        history.append(metrics)
        if callback is not None:
            callback(state, metrics)
    names = history[0] if history else {}
    return TrainInfo(state, {k: np.concatenate([m[k] for m in history]) for k in names})
