r"""The forgetting matrix of a stream of tasks, and the figures that are read from it.

========  ============================================================================
T         tasks
R[i, j]   score on task j after task i was trained, [T, T]; NaN for j > i
========  ============================================================================

.. math::
    \mathrm{ACC} = \frac1T \sum_j R_{T-1,j}, \qquad
    \mathrm{BWT} = \frac1{T-1} \sum_{j<T-1} (R_{T-1,j} - R_{j,j}), \qquad
    \mathrm{F} = \frac1{T-1} \sum_{j<T-1} \Bigl(\max_{j \le i<T-1} R_{i,j} - R_{T-1,j}\Bigr)

A negative backward transfer is forgetting; F counts from the best that a task ever had.

Paper: Lopez-Paz 2017, arXiv:1706.08840 (R, ACC, BWT); Chaudhry 2018, arXiv:1801.10112 (F).
Source: papers.
Deviates: no forward transfer: nothing serves a task that has not come.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.contracts.stream import Stream
from jlora.core.adapter import Adapter
from jlora.system import System

Train = Callable[[int, Adapter, Callable[[Adapter], Adapter], Callable[[Adapter], Array]], Adapter]


def forgetting_matrix(
    stream: Stream,
    key: PRNGKeyArray,
    fresh: Adapter,
    tasks: int,
    train: Train,
    score: Callable[[int, Adapter], float],
) -> Float[np.ndarray, "T T"]:
    """Runs a stream, and scores all tasks so far after each.

    Args:
      stream: the record of a system.
      key: folded with the task for `stream.start`.
      fresh: an adapter of `jl.init`.
      tasks: T.
      train: (task, start, running, penalty) -> the trained adapter; the model runs with
        `running(adapter)`, and `penalty(adapter)` is added to the loss.
      score: (task, adapter that serves it) -> score, larger is better.

    Returns:
      R, float64.

    Raises:
      ValueError: fewer than one task, or a score that is not finite.
    """
    if tasks < 1:
        raise ValueError(f"tasks: got {tasks}, expected at least 1")
    state, out = stream.init(fresh), np.full((tasks, tasks), np.nan)
    for i in range(tasks):
        before = state
        trained = train(
            i,
            stream.start(jax.random.fold_in(key, i), before),
            lambda adapter, before=before: stream.running(before, adapter),
            lambda adapter, before=before: stream.penalty(before, adapter),
        )
        state = stream.update(before, trained)
        for j in range(i + 1):
            out[i, j] = score(j, stream.adapter(state, j))
            if not np.isfinite(out[i, j]):
                raise ValueError(f"score of task {j} after task {i}: got {out[i, j]}")
    return out


def average_accuracy(matrix: Float[np.ndarray, "T T"]) -> float:
    """ACC: the mean score of all tasks at the end.

    Args:
      matrix: R.

    Returns:
      ACC.
    """
    return float(np.mean(_checked(matrix, 1)[-1]))


def backward_transfer(matrix: Float[np.ndarray, "T T"]) -> float:
    """BWT: what later tasks did to earlier ones, on average.

    Args:
      matrix: R, of at least two tasks.

    Returns:
      BWT; negative where tasks are forgotten.
    """
    r = _checked(matrix, 2)
    return float(np.mean(r[-1, :-1] - np.diagonal(r)[:-1]))


def forgetting(matrix: Float[np.ndarray, "T T"]) -> float:
    """F: how far each earlier task is from its best, on average.

    Args:
      matrix: R, of at least two tasks.

    Returns:
      F, at least 0 where a task was at its best before the end.
    """
    r = _checked(matrix, 2)
    return float(np.mean(np.nanmax(r[:-1, :-1], axis=0) - r[-1, :-1]))


def _checked(matrix: np.ndarray, least: int) -> np.ndarray:
    """R in float64. Raises ValueError where it is not square, too small, or lacks a score."""
    r = np.asarray(matrix, np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or len(r) < least:
        raise ValueError(f"matrix: got shape {r.shape}, expected [T, T] of at least {least} tasks")
    if not np.isfinite(r[np.tril_indices(len(r))]).all():
        raise ValueError("matrix: got a score on or below the diagonal that is not finite")
    return np.where(np.tri(len(r), dtype=bool), r, np.nan)


SYSTEM = System(
    name="Forgetting matrix",
    paper="Lopez-Paz 2017, 1706.08840; Chaudhry 2018, 1801.10112",
    symbol="forgetting_matrix",
    evidence="figures by hand; a stream whose forgetting is known",
    kind="component",
)
