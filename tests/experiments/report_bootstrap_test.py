"""Bootstrap intervals: oracle, determinism, coverage, refusals."""

import numpy as np
import pytest

from experiments.report import bootstrap


def test_interval_matches_an_independent_loop_and_is_repeatable():
    x = np.random.default_rng(0).normal(size=9)
    rng = np.random.default_rng(3)
    index = rng.integers(0, 9, (500, 9))
    means = sorted(sum(x[j] for j in row) / 9 for row in index)
    got = bootstrap.mean(x, seed=3, draws=500)
    np.testing.assert_allclose(got["low"], np.quantile(means, 0.025), atol=1e-12)
    np.testing.assert_allclose(got["high"], np.quantile(means, 0.975), atol=1e-12)
    assert got == bootstrap.mean(x, seed=3, draws=500)
    assert got != bootstrap.mean(x, seed=4, draws=500)
    assert got["n"] == 9 and got["mean"] == x.mean()


def test_pairing_removes_what_both_methods_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 0.2, 30)
    x = difficulty + 0.02 + rng.normal(0, 0.005, 30)
    y = difficulty + rng.normal(0, 0.005, 30)
    assert bootstrap.paired(x, y)["low"] > 0.01
    # Mutation: unpaired, the same difference drowns in the difficulty of the tasks.
    assert bootstrap.paired(x, rng.permutation(y))["low"] < 0


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap.mean(rng.normal(0.3, 1, 25), seed=trial, draws=400)
        hits += interval["low"] <= 0.3 <= interval["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_ratio_is_of_sums_and_exact_for_proportional_values():
    got = bootstrap.ratio([0.1, 0.4], [0.2, 0.4])
    np.testing.assert_allclose(got["mean"], 0.5 / 0.6)
    half = bootstrap.ratio([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    np.testing.assert_allclose([half["low"], half["mean"], half["high"]], 0.5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        bootstrap.mean([0.1, np.nan])
    with pytest.raises(ValueError, match="shape"):
        bootstrap.mean([])
    with pytest.raises(ValueError, match="3 and 2"):
        bootstrap.paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="denominator 0"):
        bootstrap.ratio([1, 2], [0, 1])
