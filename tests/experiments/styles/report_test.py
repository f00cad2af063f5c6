"""Figures of the report by hand: gaps, differences of styles, claims that can fail."""

import numpy as np
import pytest

from experiments.styles import report
from experiments.styles.evaluate import Scores, chosen_steps
from experiments.styles.sample import METHODS, Drawings, chosen

STYLES = ("s1", "s2", "i1", "i2", "e1")
LEVEL = dict(zip(STYLES, ("seen", "seen", "interior", "interior", "exterior"), strict=True))


def scores(flow=(0.15, 0.15, 0.12, 0.18, 0.3), ridge=(0.2,) * 5):
    rows = {name: (0.2,) * 5 for name in report.LABELS}
    rows |= {"base": (0.3, 0.3, 0.3, 0.4, 0.2), "original": (0.1, 0.1, 0.1, 0.1, 0.25)}
    rows |= {"flow": flow, "ridge": ridge}
    loss = {name: dict(zip(STYLES, values, strict=True)) for name, values in rows.items()}
    loss["soup"] = {"s1": 0.1, "s2": 0.1}
    return Scores(STYLES, LEVEL, loss, 10)


def drawings(pdiff=2.0, soup=2.0):
    far = dict.fromkeys(METHODS, 3.0) | {"pdiff": pdiff, "soup": soup, "flow": 2.1}
    one = {m: {"frechet": [x, x], "style distance": [x], "label": [0.5]} for m, x in far.items()}
    names = ("s1", "s2")
    return Drawings(names, {n: LEVEL[n] for n in names}, {}, {n: one for n in names}, {})


def test_gaps_and_differences_are_sums_over_styles():
    found = report.losses(scores())
    inside = found["interior"]
    assert inside["loss"]["flow"]["mean"] == pytest.approx(0.15)
    assert inside["gap"]["flow"]["mean"] == pytest.approx((0.18 + 0.22) / (0.2 + 0.3))
    assert inside["gap"]["original"]["mean"] == 1 and inside["gap"]["base"]["mean"] == 0
    assert inside["flow minus"]["ridge"]["mean"] == pytest.approx(-0.05)
    assert "soup" in found["seen"]["loss"] and "soup" not in inside["loss"]
    # training did not help on e1: no share of a gap is said of it, its loss counts
    assert found["exterior"]["no gap"] == ["e1"] and not found["exterior"]["gap"]
    every = found["all held out"]
    assert every["loss"]["flow"]["mean"] == pytest.approx(np.mean([0.12, 0.18, 0.3]))
    assert every["gap"]["flow"]["mean"] == inside["gap"]["flow"]["mean"]


def test_claims_follow_from_the_figures():
    def held(of, by):
        return [claim["holds"] for claim in report.claims(report.losses(of), by)]

    # interior and all held out against ridge; Cond P-Diff and the flow against the soup
    assert held(scores(), drawings()) == [True, False, True, False]
    assert held(scores(flow=(0.3,) * 5), drawings())[0] is False
    assert held(scores(), drawings(pdiff=2.05))[2] is False


def test_steps_are_chosen_on_seen_styles_alone():
    loss = {"few 5": {"s1": 0.1, "s2": 0.2, "i1": 9.0}, "few 9": {"s1": 0.2, "s2": 0.2, "i1": 0.0}}
    assert chosen_steps(loss, ("s1", "s2"), (5, 9)) == 5
    assert chosen_steps(loss, ("i1",), (5, 9)) == 9


def test_sampled_styles_are_of_every_level():
    assert chosen(scores(), 1) == ("s1", "i1", "e1")
    assert chosen(scores(), 9) == STYLES
