r"""Seeded percentile bootstrap over tasks: means, paired differences, ratios of means.

Symbols: :math:`x_t, y_t` are the values of method x and y on task t, :math:`s^*` a resample of the
n tasks with replacement. Intervals are the central ``confidence`` quantiles over ``draws``
resamples of

.. math:: \frac1n\sum_{t\in s^*} (x_t - y_t) \qquad\text{or}\qquad
    \frac{\sum_{t\in s^*} x_t}{\sum_{t\in s^*} y_t}.

Paper: Efron, Bootstrap methods, 1979.
Deviates: tasks are resampled as exchangeable; sub-tasks that share labels are not independent, so
true uncertainty is somewhat larger than these intervals.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000
CONFIDENCE = 0.95


def _values(x: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(x, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: shape {array.shape}, expected one value per task")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: value {int(np.argmin(np.isfinite(array)))} is not finite")
    return array


def _resamples(n: int, seed: int, draws: int) -> np.ndarray:
    """Task indices [draws, n]; the same for every comparison of equal n and seed."""
    return np.random.default_rng(seed).integers(0, n, (draws, n))


def _interval(point: float, resampled: np.ndarray, n: int, confidence: float) -> dict[str, Any]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return {
        "mean": float(point),
        "low": float(low),
        "high": float(high),
        "n": n,
        "confidence": confidence,
    }


def mean(
    x: ArrayLike, *, seed: int = 0, draws: int = DRAWS, confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """Interval of the mean over tasks: {mean, low, high, n, confidence}.

    Raises:
      ValueError: no values, or one that is not finite.
    """
    values = _values(x, "x")
    resampled = values[_resamples(len(values), seed, draws)].mean(axis=1)
    return _interval(values.mean(), resampled, len(values), confidence)


def paired(
    x: ArrayLike,
    y: ArrayLike,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> dict[str, Any]:
    """Interval of mean(x - y) over the same tasks, in the same order.

    Raises:
      ValueError: lengths that differ, no values, or one that is not finite.
    """
    left, right = _values(x, "x"), _values(y, "y")
    if left.shape != right.shape:
        raise ValueError(f"paired: {len(left)} and {len(right)} values, expected the same tasks")
    return mean(left - right, seed=seed, draws=draws, confidence=confidence)


def ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> dict[str, Any]:
    """Interval of sum(numerator) / sum(denominator) over tasks, both resampled together.

    Raises:
      ValueError: lengths that differ, a denominator that is not above 0 (drop such tasks first).
    """
    top, bottom = _values(numerator, "numerator"), _values(denominator, "denominator")
    if top.shape != bottom.shape:
        raise ValueError(f"ratio: {len(top)} and {len(bottom)} values, expected the same tasks")
    if (bottom <= 0).any():
        raise ValueError(
            f"ratio: denominator {bottom.min()} at {int(bottom.argmin())}, expected > 0"
        )
    index = _resamples(len(top), seed, draws)
    resampled = top[index].sum(axis=1) / bottom[index].sum(axis=1)
    return _interval(top.sum() / bottom.sum(), resampled, len(top), confidence)
