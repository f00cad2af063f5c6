"""The forgetting matrix: figures by hand, and a stream of scalars whose matrix is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.continual.matrix import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forgetting_matrix,
)
from jlora.continual.separate import SYSTEM as SEPARATE
from jlora.continual.sequential import SYSTEM as SEQUENTIAL
from jlora.core.adapter import Adapter

R = np.asarray([[0.8, 0.0, 0.0], [0.9, 0.7, 0.0], [0.5, 0.6, 0.4]])  # above: not read


def check_figures():
    assert average_accuracy(R) == pytest.approx((0.5 + 0.6 + 0.4) / 3)
    assert backward_transfer(R) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)


def test_figures_by_hand():
    check_figures()


def test_mutation_forgetting_from_the_diagonal_is_another_figure(monkeypatch):
    """What backward transfer counts from is not the best that a task ever had."""
    monkeypatch.setitem(globals(), "forgetting", lambda r: -backward_transfer(r))
    with pytest.raises(AssertionError):
        check_figures()


def scalar(value):
    """An adapter that is one number, of no site."""
    return Adapter({"": {"v": jnp.asarray(value)}}, {}, ())


@pytest.mark.parametrize(
    ("stream", "want"),
    [
        (SEQUENTIAL, [[0, None, None], [-1, 0, None], [-2, -1, 0]]),
        (SEPARATE, [[0, None, None], [0, 0, None], [0, 0, 0]]),
    ],
    ids=["sequential", "separate"],
)
def test_a_stream_of_scalars(stream, want):
    """Task k wants the number k; training gets there; the score is minus the distance."""
    seen = []

    def train(task, start, running, penalty):
        assert float(penalty(start)) == 0 and running(start) is start
        seen.append(float(start.trainable[""]["v"]))
        return scalar(float(task))

    def score(task, adapter):
        return -abs(float(adapter.trainable[""]["v"]) - task)

    got = forgetting_matrix(stream, jax.random.key(0), scalar(9.0), 3, train, score)
    np.testing.assert_array_equal(got, np.asarray(want, float))
    assert seen == ([9.0, 0.0, 1.0] if stream is SEQUENTIAL else [9.0] * 3)


def test_refusals():
    with pytest.raises(ValueError, match=r"matrix: got shape \(2, 3\)"):
        average_accuracy(R[:2])
    with pytest.raises(ValueError, match="at least 2 tasks"):
        forgetting(R[:1, :1])
    with pytest.raises(ValueError, match="score on or below the diagonal"):
        backward_transfer(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="score of task 0 after task 0: got nan"):
        forgetting_matrix(
            SEQUENTIAL, jax.random.key(0), scalar(0.0), 1, lambda k, a, *_: a, lambda k, a: np.nan
        )
    with pytest.raises(ValueError, match="tasks: got 0"):
        forgetting_matrix(
            SEQUENTIAL, jax.random.key(0), scalar(0.0), 0, lambda k, a, *_: a, lambda k, a: 0.0
        )
