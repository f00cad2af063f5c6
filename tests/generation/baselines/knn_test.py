"""k nearest neighbours against scikit-learn; ties by hand."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jlora.generation.baselines import knn


@pytest.mark.parametrize(("k", "classes"), [(1, 2), (3, 2), (5, 2), (1, 4)])
def test_classes_are_those_of_scikit_learn(k, classes):
    """Odd k and two classes, or one neighbour: there are no ties."""
    rng = np.random.default_rng(k)
    y = np.arange(17) % classes
    x, q = rng.normal(size=(17, 4)), rng.normal(size=(50, 4))
    want = KNeighborsClassifier(k).fit(x, y).predict(q)
    found = knn.scores(x, y, q, k)
    assert found.shape == (50, classes)
    np.testing.assert_array_equal(found.argmax(1), want)
    np.testing.assert_array_equal(np.floor(found).sum(1), np.full(50, k))  # k votes each


def test_a_tie_goes_to_the_class_whose_voters_are_nearer():
    x, y = np.asarray([[0.0], [1.0], [5.0], [6.0]]), np.asarray([0, 0, 1, 1])
    assert knn.scores(x, y, np.asarray([[2.0], [4.0]]), 4).argmax(1).tolist() == [0, 1]
    # Nearness is worth less than a vote: two far voters of class 1 beat one that is at hand.
    y = np.asarray([0, 1, 1])
    assert knn.scores(x[[0, 2, 3]], y, np.asarray([[0.0]]), 3).argmax(1).tolist() == [1]


@pytest.mark.parametrize("k", [0, 5])
def test_as_many_neighbours_as_there_are_examples_at_most(k):
    with pytest.raises(ValueError, match=rf"k: got {k}, expected 1 <= k <= 4 examples"):
        knn.scores(np.eye(4), np.asarray([0, 1, 0, 1]), np.eye(4), k)
