"""Nearest class mean against scikit-learn; what cannot be learned from is an error."""

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from jlora.generation.baselines import nearest_mean


def data(classes=3, seed=0):
    """Unequal classes, the last one with a single example."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.repeat(np.arange(classes - 1), [4, 6][: classes - 1]), [classes - 1]]
    )
    centre = rng.normal(size=(classes, 5))
    x = centre[labels] + rng.normal(size=(len(labels), 5))
    return x.astype("f4"), labels, rng.normal(size=(40, 5)).astype("f4")


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_those_of_scikit_learn(classes):
    x, y, q = data(classes)
    found = nearest_mean.scores(x, y, q)
    assert found.shape == (40, classes)
    want = NearestCentroid().fit(x, y).predict(q)
    np.testing.assert_array_equal(found.argmax(1), want)
    assert len(np.unique(want)) == classes
    np.testing.assert_allclose(-found[:, -1], ((q - x[-1]) ** 2).sum(1), rtol=1e-5)


def test_mutation_the_mean_over_all_examples_would_be_seen():
    x, y, q = data()
    shifted = nearest_mean.scores(x, np.roll(y, 3), q)
    assert (shifted.argmax(1) != nearest_mean.scores(x, y, q).argmax(1)).any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": np.zeros(11, int)}, "labels: got one class, expected at least two"),
        ({"labels": np.asarray([0] * 5 + [2] * 6)}, "labels: class 1 of 3 has no example"),
        ({"labels": np.full(11, -1)}, "labels: got .*expected some, all >= 0"),
        ({"labels": np.arange(3)}, r"labels: got int64\(3,\), expected integers \(11,\)"),
        ({"labels": np.zeros(11)}, r"labels: got float64\(11,\), expected integers"),
        ({"queries": np.ones((2, 4))}, r"got shapes \(11, 5\), \(2, 4\), expected \[n, d\]"),
        ({"examples": np.full((11, 5), np.nan)}, "examples: got numbers that are not finite"),
        ({"queries": np.full((1, 5), np.inf)}, "queries: got numbers that are not finite"),
    ],
)
def test_what_cannot_be_learned_from_is_an_error(change, match):
    given = dict(zip(("examples", "labels", "queries"), data(), strict=True))
    with pytest.raises(ValueError, match=match):
        nearest_mean.scores(**given | change)
