r"""Interval of an accuracy measured on n texts, by Wilson's score.

With accuracy :math:`p` on n texts and the normal quantile :math:`z` of the confidence:

.. math:: \frac{p + z^2 / 2n}{1 + z^2 / n}
    \pm \frac{z}{1 + z^2 / n} \sqrt{\frac{p (1 - p)}{n} + \frac{z^2}{4 n^2}}

Unlike a bootstrap it does not shrink to a point where all texts are right or all are wrong.

Reference: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
Deviates: the mean accuracy of several adapters on the same n texts is treated as that of one.
"""

import math
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """Bounds of an accuracy, both between 0 and 1."""

    low: float
    high: float


def interval(accuracy: float, texts: int, confidence: float = 0.95) -> Interval:
    """The interval of `accuracy` (0 to 1) on `texts` texts.

    Raises:
      ValueError: an accuracy outside 0..1, or fewer than one text.
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy: got {accuracy}, expected 0 <= x <= 1")
    if texts < 1:
        raise ValueError(f"texts: got {texts}, expected >= 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    wide = 1 + z * z / texts
    middle = (accuracy + z * z / (2 * texts)) / wide
    half = z / wide * math.sqrt(accuracy * (1 - accuracy) / texts + z * z / (4 * texts * texts))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def against(bounds: Interval, level: float) -> str:
    """One of "above", "below" or "not distinguishable from" a level such as chance."""
    if bounds.low > level:
        return "above"
    return "below" if bounds.high < level else "not distinguishable from"
