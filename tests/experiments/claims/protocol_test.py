"""Verdicts: what the figures of three seeds say, and when a claim is void."""

import numpy as np
import pytest

from experiments.claims.protocol import Claim, Figures, verdict

UNITS = tuple(f"task {i}" for i in range(8))


def claim(**changes):
    fields = dict(
        name="toy", systems=("LoRA",), statement="toy > plain", reference="none", baseline="plain",
        control="shuffled", unit="accuracy", assets=("minilm",), run=lambda seed, workdir: None,
    )  # fmt: skip
    return Claim(**{**fields, **changes})


def figures(gain, control=-0.3, seed=0, units=UNITS):
    rng = np.random.default_rng(seed)
    base = 0.6 + 0.1 * rng.normal(size=len(units))
    noise = 0.01 * rng.normal(size=(2, len(units)))
    return Figures(
        units, tuple(base + gain + noise[0]), tuple(base), tuple(base + control + noise[1])
    )


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.1, "reproduced"), (-0.1, "other way round"), (0.0005, "undecided")]
)
def test_the_verdict_is_where_the_interval_lies(gain, expected):
    seeds = [figures(gain, seed=s) for s in range(3)]
    judged = verdict(claim(), seeds)
    assert judged.verdict == expected
    d = np.mean([np.subtract(f.system, f.baseline) for f in seeds], axis=0)
    np.testing.assert_allclose(judged.difference["mean"], d.mean(), rtol=1e-9)
    assert judged.difference["n"] == len(UNITS)  # units are resampled, seeds are averaged


def test_less_can_be_better_and_a_margin_must_be_passed():
    seeds = [figures(-0.1, control=0.3, seed=s) for s in range(3)]
    assert verdict(claim(less_is_better=True), seeds).verdict == "reproduced"
    assert verdict(claim(less_is_better=True, margin=0.2), seeds).verdict == "other way round"
    gain = verdict(claim(less_is_better=True), seeds).difference["mean"]
    assert verdict(claim(less_is_better=True, margin=gain), seeds).verdict == "undecided"


def test_a_control_that_does_not_fail_makes_any_claim_void():
    seeds = [figures(0.1, control=0.1, seed=s) for s in range(3)]
    assert verdict(claim(), seeds).verdict == "void"


def test_seeds_on_other_units_are_pooled():
    seeds = [figures(0.1, seed=s, units=tuple(f"{s} {u}" for u in UNITS)) for s in range(3)]
    assert verdict(claim(), seeds).difference["n"] == 3 * len(UNITS)


def test_too_few_seeds_and_uneven_figures_are_errors():
    with pytest.raises(ValueError, match="got 2 seeds, expected at least 3"):
        verdict(claim(), [figures(0.1)] * 2)
    short = figures(0.1)._replace(control=(0.1,))
    with pytest.raises(ValueError, match="control: got"):
        verdict(claim(), [short] * 3)
    bad = figures(0.1)._replace(system=(float("nan"),) * len(UNITS))
    with pytest.raises(ValueError, match="not finite"):
        verdict(claim(), [bad] * 3)
