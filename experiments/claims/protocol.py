r"""What a claim is: figures per seed, an interval, a verdict, and a control that has to fail.

A paper says that system :math:`x` is better than baseline :math:`y`. Per seed :math:`s` both are
measured on the same units :math:`t` (tasks, users, held-out pictures), and so is a control
:math:`z`: the same system on an input from which the information is removed (shuffled, random,
zero, flipped). With :math:`d_{st} = x_{st} - y_{st}` (signs turned where less is better):

.. math:: \bar d \pm \text{bootstrap over the units } t \text{ of } \textstyle\frac1S\sum_s d_{st}

The verdict is *reproduced* when the interval lies above the margin, *other way round* when it lies
below, else *undecided*. The control must lie below the system: an interval of :math:`x - z` that
does not lie above zero makes the claim *void*, whatever else came out.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from experiments.report import bootstrap

Verdict = Literal["reproduced", "undecided", "other way round", "void"]
MIN_SEEDS = 3


class Figures(NamedTuple):
    """What one seed measured, each value on the same units in the same order."""

    units: tuple[str, ...]  # names of tasks, users, pictures, ...
    system: tuple[float, ...]  # of the system that the claim is about
    baseline: tuple[float, ...]  # of what it is compared with
    control: tuple[float, ...]  # of the system without the information that it needs
    more: Mapping[str, float] = {}  # other figures worth keeping, by name


class Claim(NamedTuple):
    """A claim file's `CLAIM`."""

    name: str  # of the file, and of the record
    systems: tuple[str, ...]  # names in the registry whose claim it is
    statement: str  # what is claimed, as an inequality in words
    reference: str  # where the paper says so
    baseline: str  # what the system is compared with
    control: str  # what is done to the input that must make the system fail
    unit: str  # of the figures: "accuracy", "perplexity", ...
    assets: tuple[str, ...]  # names in `experiments.data.pinned.ASSETS`; never empty
    run: Callable[[int, Path], Figures]  # (seed, workdir for what seeds share) -> figures
    margin: float = 0.0  # by how much the system must be better
    less_is_better: bool = False  # of the figures


class HasClaim(Protocol):
    """A claim module."""

    CLAIM: Claim


class Judged(NamedTuple):
    """A verdict with the intervals behind it."""

    verdict: Verdict
    difference: Mapping[str, Any]  # of system - baseline: mean, low, high, n, confidence
    control: Mapping[str, Any]  # of system - control, the same


def verdict(claim: Claim, seeds: Sequence[Figures]) -> Judged:
    """The verdict on a claim.

    Args:
      claim: margin and direction.
      seeds: the figures of at least `MIN_SEEDS` seeds, all on the same units.

    Raises:
      ValueError: too few seeds, units that differ, figures that are not finite.
    """
    if len(seeds) < MIN_SEEDS:
        raise ValueError(f"{claim.name}: got {len(seeds)} seeds, expected at least {MIN_SEEDS}")
    values = {}
    for name in ("system", "baseline", "control"):
        rows = [getattr(f, name) for f in seeds]
        if any(len(r) != len(seeds[0].units) for r in rows):
            raise ValueError(f"{claim.name}: {name}: got {[len(r) for r in rows]} values, expected "
                             f"{len(seeds[0].units)} units per seed")  # fmt: skip
        values[name] = np.asarray(rows, np.float64)
    if len({f.units for f in seeds}) == 1:  # the same units: seeds are averaged, units resampled
        values = {k: v.mean(axis=0) for k, v in values.items()}
    sign = -1.0 if claim.less_is_better else 1.0
    flat = {k: sign * v.reshape(-1) for k, v in values.items()}
    difference = bootstrap.paired(flat["system"], flat["baseline"])
    control = bootstrap.paired(flat["system"], flat["control"])
    if control["low"] <= 0:
        return Judged("void", difference, control)
    if difference["low"] > claim.margin:
        return Judged("reproduced", difference, control)
    if difference["high"] < claim.margin:
        return Judged("other way round", difference, control)
    return Judged("undecided", difference, control)
