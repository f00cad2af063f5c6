"""Logistic regression against scikit-learn, and the optimality of its answer."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jlora.generation.baselines import logistic


def data(classes, n=24, d=6, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return x.astype("f4"), y, rng.normal(size=(10, d)).astype("f4")


@pytest.mark.parametrize(("classes", "penalty"), [(2, 0.3), (2, 30.0), (3, 2.0)])
def test_probabilities_are_those_of_scikit_learn(classes, penalty):
    x, y, q = data(classes)
    found = logistic.scores(x, y, q, penalty)
    odds = np.exp(found - found.max(1, keepdims=True))
    # A single row of weights w = w_1 - w_0 costs lambda |w|^2 / 4 when shared by two rows.
    strength = (2.0 if classes == 2 else 1.0) / penalty
    peer = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x.astype("f8"), y)
    want = peer.predict_proba(q.astype("f8"))
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), want, atol=2e-5)
    other = logistic.scores(x, y, q, 3 * penalty)
    assert np.abs(other - found).max() > 1e-2  # the penalty counts


def test_a_large_penalty_leaves_the_shares_of_the_classes():
    x, y, q = data(3)
    y = np.minimum(y, 1)  # one third, two thirds
    found = logistic.scores(x, y, q, 1e7)
    np.testing.assert_allclose(found[:, 1] - found[:, 0], np.log(2), atol=1e-4)


def test_one_example_per_class_is_enough():
    found = logistic.scores(np.eye(3), np.arange(3), np.eye(3), 0.1)
    assert found.argmax(1).tolist() == [0, 1, 2]


def test_a_penalty_of_nothing_is_an_error():
    for penalty in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"penalty: got .*, expected > 0"):
            logistic.scores(*data(2), penalty)
