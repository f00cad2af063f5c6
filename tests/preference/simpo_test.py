"""SimPO: value by numpy; the length of an answer is no advantage."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.contracts.preference import LogProbs
from jlora.preference.simpo import simpo

C, R = -np.abs(np.random.default_rng(0).normal(size=(2, 6))) * 3
LENGTHS = np.asarray([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])


def given(c, r, lengths=LENGTHS):
    return LogProbs(*(jnp.asarray(t, jnp.float32) for t in (c, r, *lengths)))


def test_value_by_numpy():
    reward = 2.5 * (C / LENGTHS[0] - R / LENGTHS[1]) - 0.7
    want = np.log(1 + np.exp(-reward))
    np.testing.assert_allclose(simpo(given(C, R), beta=2.5, gamma=0.7), want, rtol=1e-5)


def test_twice_the_answer_of_twice_the_log_probability_is_the_same():
    longer = given(2 * C, R, (2 * LENGTHS[0], LENGTHS[1]))
    np.testing.assert_allclose(simpo(longer), simpo(given(C, R)), rtol=1e-6)


def test_refusal():
    with pytest.raises(ValueError, match=r"beta: got 0\.0, expected > 0"):
        simpo(given(C, R), beta=0.0)
