r"""One optimizer step over the parts of a batch.

.. math::
    g = \frac{\sum_k \nabla S_k}{\sum_k N_k}

Symbols: part k of the batch, its sum of losses S and its number of learned tokens N (see `loss`).
The gradient is that of the whole batch at once, however it is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.finetuning import loss
from experiments.finetuning.packing import Rows
from jlora import Adapter


class State(NamedTuple):
    """All that changes during a run; of arrays, their shapes or their shardings."""

    step: Any  # int32 []: steps done
    trainable: Any  # of the adapter
    optimizer: Any  # its state
    losses: Any  # float32 [steps]: per learned token, of each step done


class Report(NamedTuple):
    """What a step says of itself."""

    loss: Array  # float32 []
    norm: Array  # float32 []: of the gradient
    finite: Array  # bool []: whether loss, gradient and result all are


def initial(trainable: Any, optimizer: optax.GradientTransformation, steps: int) -> State:
    """The state before the first of `steps` steps."""
    losses = jnp.zeros((steps,), jnp.float32)
    return State(jnp.int32(0), trainable, optimizer.init(trainable), losses)


def make(
    tuned: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Callable[[Any, Adapter, State, Rows, Array], tuple[State, Report]]:
    """The step ``(params, adapter, state, parts, key) -> (state, report)``, to be jitted.

    Args:
      tuned: the lifted decoder.
      optimizer: of `Adapter.trainable`; it may ask for `frozen`.
    """
    rule = optax.with_extra_args_support(optimizer)

    def step(
        params: Any, adapter: Adapter, state: State, rows: Rows, key: Array
    ) -> tuple[State, Report]:
        key = jax.random.fold_in(key, state.step)

        def total(trainable: Any, part: Rows, index: Array) -> tuple[Array, Array]:
            ctx = {"key": jax.random.fold_in(key, index)}
            adapted = adapter.replace(trainable=trainable)
            out = tuned(params, adapted, part.ids, part.positions, part.segments, ctx=ctx)
            return loss.total(out.logits, part.ids, part.weights)

        def add(carry: Any, now: Any) -> tuple[Any, None]:
            (value, count), grads = jax.value_and_grad(total, has_aux=True)(state.trainable, *now)
            return jax.tree.map(jnp.add, carry, (value, count, grads)), None

        nothing = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
        parts = jnp.arange(rows.ids.shape[0])
        (value, count, grads), _ = jax.lax.scan(add, nothing, (rows, parts))
        value = value / count
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        norm = _norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = rule.update(
                grads, state.optimizer, state.trainable, frozen=adapter.frozen
            )
        trainable = optax.apply_updates(state.trainable, updates)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        finite &= jnp.isfinite(_norm(trainable))
        losses = state.losses.at[state.step].set(value)
        return State(state.step + 1, trainable, inner, losses), Report(value, norm, finite)

    return step


def _norm(tree: Any) -> Array:
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(sum((jnp.sum(x * x) for x in jax.tree.leaves(tree)), jnp.float32(0)))
