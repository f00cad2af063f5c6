r"""Early exits of a recursive transformer: how they are trained, measured and taken.

===========  ==================================================================================
J            runs of the shared block; :math:`\ell^j` are the logits after run j
α_j          weight of run j's loss, divided by the sum of all weights
===========  ==================================================================================

.. math::
    L = \frac{\sum_j \alpha_j L_j}{\sum_j \alpha_j}, \qquad
    \alpha = \begin{cases}
      (j + 1)_j & \text{weighted} \\
      (0.1, \dots, 0.1, 1) & \text{aggressive} \\
      (0, \dots, 0, 1) & \text{last}
    \end{cases}

    e_{\text{oracle}} = \min \{ j : \arg\max \ell^j = \arg\max \ell^{J-1} \}, \qquad
    e_\tau = \min \left( \{ j : \max \operatorname{softmax} \ell^j > \tau \} \cup \{J - 1\} \right)

The oracle knows what the whole model predicts; its exits bound what a rule that decides by
confidence can save at the same answers.

Reference: Bae et al. 2024, arXiv:2410.20672 (weights of the losses, oracle); Schuster et al. 2022,
    arXiv:2207.07061 (exits by the largest probability).
Deviates: weights and oracle follow summaries of the first paper; its distillation from the last
    run into the earlier ones is not here.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Weighting = Literal["weighted", "aggressive", "last"]
WEIGHTINGS: tuple[Weighting, ...] = ("weighted", "aggressive", "last")


class BlockRuns(NamedTuple):
    """Runs of the block, each for a whole batch, until every token of every row is out."""

    full: int  # without early exits
    waiting: int  # a step lasts until its slowest row has left the block
    depth_wise: int  # every row goes on by itself, and a row that ends is replaced at once


def loss_weights(loops: int, weighting: Weighting = "aggressive") -> np.ndarray:
    """α, normalised.

    Args:
      loops: J, at least 1.
      weighting: "aggressive" keeps the last output best, "weighted" makes the earlier ones better,
        "last" does not train them.

    Returns:
      float32 [J], of sum 1.

    Raises:
      ValueError: no run, or an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: got {weighting!r}, expected one of {WEIGHTINGS}")
    if loops < 1:
        raise ValueError(f"loops: got {loops}, expected at least 1")
    early = {"aggressive": np.full(loops, 0.1), "last": np.zeros(loops)}
    alpha = early.get(weighting, np.arange(1.0, loops + 1))
    if weighting != "weighted":
        alpha[-1] = 1.0
    return (alpha / alpha.sum()).astype(np.float32)


def exit_loss(
    losses: Float[Array, "loops"], weighting: Weighting = "aggressive"
) -> Float[Array, ""]:
    """L, of the losses of every run's output.

    Args:
      losses: L_j, as a model's own loss gives them for each of its outputs.
      weighting: as of `loss_weights`.

    Returns:
      A scalar.

    Raises:
      ValueError: as `loss_weights`.
    """
    return jnp.sum(jnp.asarray(loss_weights(len(losses), weighting)) * losses)


def oracle_exits(logits: Float[Array, "loops *tokens vocab"]) -> Int[Array, "*tokens"]:
    """The first run after which the answer is that of the whole model.

    Args:
      logits: after every run.

    Returns:
      e, from 0 to J - 1, int32.
    """
    best = jnp.argmax(logits, axis=-1)
    return jnp.argmax(best == best[-1:], axis=0).astype(jnp.int32)


def confident(logits: Float[Array, "*tokens vocab"], threshold: float) -> Bool[Array, "*tokens"]:
    """Whether the likeliest token is likelier than a threshold.

    Args:
      logits: after one run.
      threshold: tau; 1: never.

    Returns:
      True where a token may leave.
    """
    return jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1) > threshold


def confident_exits(
    logits: Float[Array, "loops *tokens vocab"], threshold: float
) -> Int[Array, "*tokens"]:
    """The first run whose output is confident; the last one where none is.

    Args:
      logits: after every run.
      threshold: tau, as of `confident`.

    Returns:
      e, from 0 to J - 1, int32.
    """
    out = confident(logits, threshold).at[-1].set(True)
    return jnp.argmax(out, axis=0).astype(jnp.int32)


def block_runs(exits: Sequence[Sequence[int]], rows: int, loops: int) -> BlockRuns:
    """How often a batch runs the block, by three ways of batching. A count, not a time.

    Args:
      exits: per request, the exit e of each of its new tokens.
      rows: of the batch; requests enter in order, wherever a row ends.
      loops: J.

    Returns:
      Three numbers of runs.

    Raises:
      ValueError: no row, a request without tokens, or an exit outside of 0 .. J - 1.
    """
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    for number, request in enumerate(exits):
        if not len(request) or min(request) < 0 or max(request) >= loops:
            raise ValueError(f"exits: request {number}: got {list(request)}, expected tokens that "
                             f"leave after run 0 to {loops - 1}")  # fmt: skip
    queue, running, full, waiting = [list(r) for r in exits], [], 0, 0
    while queue or running:
        while queue and len(running) < rows:
            running.append(queue.pop(0))
        full += loops
        waiting += max(request.pop(0) for request in running) + 1
        running = [request for request in running if request]
    free = [0] * rows  # by row, the runs after which it is free
    for request in exits:
        first = free.index(min(free))
        free[first] += sum(e + 1 for e in request)
    return BlockRuns(full, waiting, max(free))
