"""Multistep consistency sampling: the law of a Gaussian at any number of steps, and by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import multistep
from jlora.generation.diffusion.consistency import Distillation
from tests.generation.diffusion.consistency_test import FLOW, MEAN, PLAN, SPREAD, exact


def velocity(z, t):
    """The velocity whose jump is the exact consistency function."""
    return (z - exact(z, t)) / t


def run(steps, denoise=velocity):
    return np.asarray(multistep.sample(denoise, jax.random.key(0), (64, 64), PLAN, steps))


@pytest.mark.parametrize("steps", [1, 4])
def test_any_number_of_steps_draws_the_law(steps):
    x = run(steps)
    assert abs(x.mean() - MEAN) < 0.04 and abs(x.std() - SPREAD) < 0.02


def test_mutation_noise_of_another_level(monkeypatch):
    monkeypatch.setattr(multistep, "jump", lambda plan, u, z, t: z - 0.5 * t * u)
    with pytest.raises(AssertionError):
        test_any_number_of_steps_draws_the_law(4)


def test_levels_lie_on_the_grid():
    np.testing.assert_allclose(multistep.times(PLAN, 1), [1.0])
    np.testing.assert_allclose(multistep.times(PLAN, 4), [1.0, 0.76, 0.5, 0.26])
    np.testing.assert_allclose(multistep.times(PLAN, 50), np.arange(50, 0, -1) / 50, rtol=1e-6)
    for steps in (0, 51):
        with pytest.raises(ValueError, match=f"steps: got {steps}, expected 1 to 50"):
            multistep.times(PLAN, steps)


def test_three_steps_by_hand_in_a_batch():
    plan, shape = Distillation(FLOW, steps=3), (2, 2)
    denoise = lambda params, z, t, cond, scale: params * z + scale * t * cond  # noqa: E731
    keys, cond = jax.random.split(jax.random.key(1), 2), jnp.asarray([0.5, -1.0])
    run = multistep.build(denoise, shape, plan, 3)
    got = run(jnp.float32(0.3), keys, cond, jnp.float32(2.0))
    for key, c, one in zip(keys, np.asarray(cond), got, strict=True):
        first, rest = jax.random.split(key)
        noises = [first, *jax.random.split(rest, 2)]
        x = np.zeros(shape)
        for t, key in zip((1.0, 2 / 3, 1 / 3), noises, strict=True):
            z = (1 - t) * x + t * np.asarray(jax.random.normal(key, shape), np.float64)
            x = z - t * (0.3 * z + 2.0 * t * c)
        np.testing.assert_allclose(one, x, atol=1e-5)
