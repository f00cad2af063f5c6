r"""Optimizers of many jobs: each steps when its own global batch is complete.

==========  ==========================================================================
N           jobs, the leading axis of every array
G_n         sum of the gradients of job n since its last step
d_n         whether its global batch is complete
eta_n       its learning rate
==========  ==========================================================================

.. math::
    G_n \leftarrow G_n + g_n, \qquad
    (\theta_n, s_n, G_n) \leftarrow
    \begin{cases} (\theta_n + \eta_n u(G_n, s_n, \theta_n), \; s_n', \; 0) & d_n \\
    (\theta_n, s_n, G_n) & \text{else} \end{cases}

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206.
Deviates: the update is computed for every job and taken where d_n; no counts are kept, the plan
says when a batch is complete.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from jlora.types import Dynamic, Tree


class State(NamedTuple):
    """What training keeps, all arrays with a leading axis of jobs."""

    trainable: Tree  # theta, as `jl.stack` makes it
    optimizer: Tree  # s
    gradients: Tree  # G


def start(trainable: Tree, solver: optax.GradientTransformation) -> State:
    """The state before the first microbatch.

    Args:
      trainable: of a bank, [N, ...].
      solver: one transformation for every job, with its sign and without a rate: ``optax.chain(
        optax.scale_by_adam(), optax.scale(-1.0))``.

    Returns:
      The state.
    """
    return State(
        trainable, jax.vmap(solver.init)(trainable), jax.tree.map(jnp.zeros_like, trainable)
    )


def advance(
    state: State,
    gradients: Tree,
    done: Bool[jax.Array, "n"],
    rates: Float[jax.Array, "n"],
    solver: optax.GradientTransformation,
) -> State:
    """Adds the gradients of one microbatch, and steps the jobs that are done.

    Args:
      state: before.
      gradients: of the microbatch, as `state.trainable`; zero for jobs that are not in it.
      done: whose global batch ends here, of `Plan.steps`.
      rates: eta, positive.
      solver: as in `start`.

    Returns:
      The state after it.
    """
    total = jax.tree.map(jnp.add, state.gradients, gradients)
    updates, optimizer = jax.vmap(solver.update)(total, state.optimizer, state.trainable)

    def where(new: Dynamic, old: Dynamic) -> Dynamic:
        return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def moved(t: Dynamic, u: Dynamic) -> Dynamic:
        return where((t + rates.astype(t.dtype).reshape(-1, *[1] * (t.ndim - 1)) * u), t)

    return State(
        jax.tree.map(moved, state.trainable, updates),
        jax.tree.map(where, optimizer, state.optimizer),
        jax.tree.map(lambda g: where(jnp.zeros_like(g), g), total),
    )
