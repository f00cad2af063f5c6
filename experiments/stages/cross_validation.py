"""Which method to use for a task of which K examples per class are all that is known.

Folds keep the shares of the classes; a fold's examples are hidden from whatever is fitted,
generated or trained for it. Each method has a figure per example (1: right; a share where several
adapters were sampled). Intervals are over examples: Wilson's of a method, a paired bootstrap of a
difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.report import bootstrap, names, wilson
from experiments.stages.world import Rows

FOLDS = 4


class Fold(NamedTuple):
    """Positions in the examples."""

    kept: np.ndarray  # that a method may see
    hidden: np.ndarray  # that it is asked for


class Verdict(NamedTuple):
    """Of one task; written as cross_validation.json."""

    best: str  # method of the highest figure, the generated adapter on a tie
    n: int  # examples
    figures: dict[str, dict[str, float]]  # method -> mean, low, high
    lead: dict[str, float]  # best minus generated (or minus the next best): mean, low, high
    over: str  # the method that `lead` is over


def folds(label: np.ndarray, seed: int) -> list[Fold]:
    """Stratified folds; [] where a class has a single example.

    Args:
      label: [n] class of each example.
    """
    count = min(FOLDS, int(np.bincount(label).min()))
    if count < 2:
        return []
    rng, which = np.random.default_rng([seed, 13]), np.zeros(len(label), np.int64)
    for side in np.unique(label):
        own = np.flatnonzero(label == side)
        which[rng.permutation(own)] = np.arange(len(own)) % count
    return [Fold(np.flatnonzero(which != k), np.flatnonzero(which == k)) for k in range(count)]


def taken(rows: Rows, where: np.ndarray) -> Rows:
    """Some of the labelled texts."""
    return Rows(rows.index[where], rows.label[where])


def verdict(scores: Mapping[str, np.ndarray], seed: int = 0) -> Verdict:
    """Compare methods on the same examples.

    Args:
      scores: method -> [n] in 0..1, of "generated" and rivals. seed: of the bootstrap.
    """
    order = ["generated", *(key for key in names.rivals(names.USER) if key in scores)]
    mean = {key: float(scores[key].mean()) for key in order}
    best = max(order, key=lambda key: mean[key])
    rest = [key for key in order if key != "generated"]
    over = max(rest, key=lambda key: mean[key]) if best == "generated" else "generated"
    pair = bootstrap.paired(scores[best], scores[over], seed=seed)
    figures = {}
    for key in order:
        bounds = wilson.interval(mean[key], len(scores[key]))
        figures[key] = {"mean": mean[key], "low": bounds.low, "high": bounds.high}
    lead = {key: float(pair[key]) for key in ("mean", "low", "high")}
    return Verdict(best, len(scores[best]), figures, lead, over)


def sentence(verdict: Verdict | None) -> str:
    """What to use, by how much, and how sure that is."""
    if verdict is None:
        return (
            "nothing is recommended: with a single example of a class nothing can be"
            " cross-validated"
        )
    own, other = verdict.figures[verdict.best], verdict.figures[verdict.over]
    lead = verdict.lead
    by = (
        f"{100 * own['mean']:.1f} % against {100 * other['mean']:.1f} %,"
        f" {100 * lead['mean']:+.1f} points (95 % interval {100 * lead['low']:+.1f} to"
        f" {100 * lead['high']:+.1f}), cross-validated on the {verdict.n} examples"
    )
    if lead["low"] <= 0:
        by += ", which are too few to be sure"
    if verdict.best == "generated" and lead["mean"] <= 0:
        return (
            f"nothing is better than the generated adapter, and {names.method(verdict.over).label}"
            f" is as good: {by}"
        )
    if verdict.best == "generated":
        return f"use the generated adapter: before {names.method(verdict.over).label}, {by}"
    return (
        f"the generated adapter is NOT the best here: use {names.method(verdict.best).label}"
        f" ({verdict.best}): {by}"
    )


def as_json(verdict: Verdict | None) -> dict[str, Any]:
    """What is written."""
    return {} if verdict is None else verdict._asdict()
