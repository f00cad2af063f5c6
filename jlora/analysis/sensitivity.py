r"""How much the learning rate decides, and how much the method: the spreads of a sweep.

===========  ================================================================================
v, s, e, t   method, seed, learning rate (each method has a grid of its own), task
x, y         accuracy on test rows and on validation rows, [v, s, e, t]
e*_v         the rate of a method: that of the best mean validation accuracy
===========  ================================================================================

Seeds are averaged first (a bar), and every spread is one number per task, so that an interval can
be computed over tasks:

.. math::
    e^*_v = \arg\max_e \textstyle\sum_t \bar y_{vet}, \qquad
    \mathrm{rates}_{vt} = \max_e \bar x_{vet} - \min_e \bar x_{vet}, \qquad
    \mathrm{methods}_t = \max_v \bar x_{v e^*_v t} - \min_v \bar x_{v e^*_v t}

The study's finding is that :math:`\mathrm{median}_v\, \mathrm{rates}_{vt}` exceeds
:math:`\mathrm{methods}_t`, and that tuned LoRA is as good as the method that validation rows rank
first (`behind`). Both are ranges, so noise makes both larger, the more the more values they are of:
`noise`, the range of as many runs as there are rates which differ in the seed alone, is what a rate
without any effect would show.

Reference: He et al. 2026, arXiv:2601.22708 (its abstract, which has no numbers).
Deviates: the abstract says what is found in words; ranges per task, the median and the choice of
  rates on validation rows are original to jlora.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jlora.system import System


class Spreads(NamedTuple):
    """What a sweep says, float64."""

    rate: Int[np.ndarray, "v"]  # e*_v, its place in the grid
    best: Float[np.ndarray, "v t"]  # test accuracy there, mean over seeds
    rates: Float[np.ndarray, "v t"]  # spread over learning rates
    methods: Float[np.ndarray, "t"]  # spread over methods, each at its own rate

    @property
    def over_rates(self) -> Float[np.ndarray, "t"]:
        """The spread over learning rates of the median method, per task."""
        return np.median(self.rates, axis=0)


def spreads(
    validation: Float[np.ndarray, "v s e t"], test: Float[np.ndarray, "v s e t"]
) -> Spreads:
    """The spreads over learning rates and over methods.

    Args:
      validation: accuracies that choose the rates.
      test: accuracies that everything else is measured on, of the same runs.

    Returns:
      Both spreads per task, the rates and the accuracies there.

    Raises:
      ValueError: shapes that differ or lack an axis, an axis without entries, fewer than 2 rates
        (nothing to spread over), values that are not finite.
    """
    y, x = (np.asarray(t, np.float64) for t in (validation, test))
    if x.shape != y.shape or x.ndim != 4 or not x.size or x.shape[2] < 2:
        raise ValueError(f"spreads: got validation {y.shape} and test {x.shape}, expected one "
                         "shape [methods, seeds, rates, tasks] with at least 2 rates")  # fmt: skip
    for name, values in (("validation", y), ("test", x)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: got values that are not finite, expected accuracies")
    rate = y.mean((1, 3)).argmax(1)
    mean = x.mean(1)
    best = mean[np.arange(len(mean)), rate]
    return Spreads(rate, best, np.ptp(mean, axis=1), np.ptp(best, axis=0))


def behind(
    validation: Float[np.ndarray, "v s e t"], spread: Spreads, method: int
) -> Float[np.ndarray, "t"]:
    """By how much one method is below the best one, per task; negative where it is above.

    Args:
      validation: the accuracies that `spread` is of; they say which method is the best one, so that
        the luck of the test rows does not.
      spread: of `spreads`.
      method: the place of the one method, such as LoRA, on the axis v.

    Returns:
      Test accuracy of the best method minus that of the one; zeros where they are the same.

    Raises:
      ValueError: no such method.
    """
    if not 0 <= method < len(spread.best):
        raise ValueError(f"method: got {method}, expected 0 to {len(spread.best) - 1}")
    y = np.asarray(validation, np.float64).mean((1, 3))
    top = int(y[np.arange(len(y)), spread.rate].argmax())
    return spread.best[top] - spread.best[method]


def noise(runs: Float[np.ndarray, "v n t"]) -> Float[np.ndarray, "t"]:
    """The range that runs at one rate have which differ in the seed alone, per task.

    Args:
      runs: test accuracies, n of them per method; as many as there are rates, for the range grows
        with n.

    Returns:
      Of the median method.

    Raises:
      ValueError: another number of axes, or fewer than 2 runs.
    """
    x = np.asarray(runs, np.float64)
    if x.ndim != 3 or x.shape[1] < 2:
        raise ValueError(f"runs: got {x.shape}, expected [methods, runs, tasks], 2 runs or more")
    return np.median(np.ptp(x, axis=1), axis=0)


SYSTEM = System(
    name="Unified Study of LoRA Variants",
    paper="He 2026, 2601.22708",
    symbol="spreads",
    kind="analysis",
    evidence="spreads by loops; a sweep whose rates do nothing, one whose methods are one",
    rows=(45,),
    claim="variants",
)
