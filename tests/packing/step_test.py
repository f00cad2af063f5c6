"""Each job's optimizer sees its own batches: equal to the jobs on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.packing import step

SOLVER = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
RATES = np.array([0.1, 0.02], np.float32)
DONE = ((True, False), (False, False), (True, True), (False, True))


@pytest.fixture(scope="module")
def gradients():
    rng = np.random.default_rng(0)
    return [{"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)} for _ in DONE]


def alone(n, gradients):
    """Job n by itself, Adam in numpy."""
    theta, total, m, v, t = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3), 0
    for g, done in zip(gradients, DONE, strict=True):
        total = total + np.asarray(g["w"][n], np.float64)
        if done[n]:
            t += 1
            m, v = 0.9 * m + 0.1 * total, 0.999 * v + 0.001 * total**2
            hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            theta, total = theta - RATES[n] * hat[0] / (np.sqrt(hat[1]) + 1e-8), np.zeros(3)
    return theta, total


@pytest.fixture(scope="module")
def states(gradients):
    with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
        state = step.start({"w": jnp.zeros((2, 3))}, SOLVER)
        move = jax.jit(lambda s, g, d: step.advance(s, g, d, jnp.asarray(RATES), SOLVER))
        out = [state]
        for g, done in zip(gradients, DONE, strict=True):
            out.append(move(out[-1], g, jnp.asarray(done)))
    return out


@pytest.mark.parametrize("n", [0, 1])
def test_a_job_is_trained_as_if_alone(states, gradients, n):
    theta, total = alone(n, gradients)
    np.testing.assert_allclose(states[-1].trainable["w"][n], theta, rtol=2e-5)
    np.testing.assert_allclose(states[-1].gradients["w"][n], total, rtol=1e-6, atol=1e-7)


def test_a_job_that_is_not_done_does_not_move(states):
    before, after = states[1], states[2]
    for name in ("trainable", "optimizer"):
        old, new = (jax.tree.leaves(getattr(s, name)) for s in (before, after))
        assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))
    assert not np.array_equal(before.trainable["w"][0], states[0].trainable["w"][0])
    assert np.array_equal(before.trainable["w"][1], states[0].trainable["w"][1])
