r"""Knowledge distillation into an adapter: it learns what another model says of the same texts.

=========  ====================================================================================
T          logits of the teacher, [C]
S          logits of the student, [C]
tau        temperature; 0: the teacher's answer alone, as one-hot labels
=========  ====================================================================================

.. math::
    q = \mathrm{softmax}(T / \tau), \qquad
    L = - \frac{1}{N} \sum_x \sum_c q_c(x) \log \mathrm{softmax}(S(x))_c

Teacher and student need nothing in common but the classes: neither width, depth nor vocabulary.

Reference: Hinton et al. 2015, arXiv:1503.02531.
Deviates: the student has temperature 1, so that what it learns are probabilities it can be used
with; nothing is added for true labels, because written texts have none.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.types import Dynamic, Tree

Apply = Callable[..., Array]  # (params, *inputs) -> logits [N, C]


class Distilled(NamedTuple):
    """A student after its training."""

    adapter: Adapter  # the student's
    losses: Float[Array, "steps"]  # of each batch


def soft_labels(logits: Float[Array, "*n C"], temperature: float = 1.0) -> Float[Array, "*n C"]:
    """The teacher's probabilities.

    Args:
      logits: T.
      temperature: tau; 1 are the teacher's own probabilities.

    Returns:
      q, which sums to 1 over the classes.

    Raises:
      ValueError: a temperature below 0.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, expected >= 0")
    if temperature == 0:
        return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    return jax.nn.softmax(logits / temperature, axis=-1)


def distillation_loss(
    logits: Float[Array, "n C"], targets: Float[Array, "n C"]
) -> Float[Array, ""]:
    """Cross entropy of the student under the teacher's probabilities.

    Args:
      logits: S; minus infinity for a class that does not exist.
      targets: q.

    Returns:
      L, the mean over rows.
    """
    return optax.safe_softmax_cross_entropy(logits, targets).mean()


def distill(
    key: PRNGKeyArray,
    apply: Apply,
    params: Tree,
    adapter: Adapter,
    inputs: tuple[Dynamic, ...],
    targets: Float[Array, "N C"],
    *,
    solver: optax.GradientTransformation,
    steps: int,
    batch: int,
) -> Distilled:
    """Trains an adapter of any method on the teacher's probabilities, under one scan.

    Args:
      key: of the rows of each batch, drawn with replacement.
      apply: the student's model, (params, *inputs) -> logits.
      params: of its base, frozen.
      adapter: its start, as `jl.init` makes it.
      inputs: what the model takes after its parameters, every array with N rows.
      targets: of `soft_labels`.
      solver: an optax transformation.
      steps: of training.
      batch: rows per step.

    Returns:
      The trained adapter, and the loss of every step.

    Raises:
      ValueError: no steps or rows, or inputs whose rows are not those of the targets.
    """
    size = targets.shape[0]
    if steps < 1 or batch < 1:
        raise ValueError(f"distill: got {steps} steps of {batch} rows, expected 1 of 1 at least")
    for leaf in jax.tree.leaves(inputs):
        if leaf.shape[:1] != (size,):
            raise ValueError(f"inputs: got shape {leaf.shape}, expected {size} rows as the targets")
    model = lift(apply)

    def loss(trainable: Tree, rows: Array) -> Array:
        drawn = jax.tree.map(lambda x: x[rows], inputs)
        logits = model(params, adapter.replace(trainable=trainable), *drawn)
        return distillation_loss(logits, targets[rows])

    def step(carry, number):
        trainable, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, number), (batch,), 0, size)
        value, grads = jax.value_and_grad(loss)(trainable, rows)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = solver.update(grads, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    start = adapter.trainable, solver.init(adapter.trainable)
    (trainable, _), losses = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return Distilled(adapter.replace(trainable=trainable), losses)
