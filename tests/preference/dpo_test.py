"""DPO: value by numpy, gradient by hand, and an adapter that learns a preference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.contracts import preference
from jlora.contracts.preference import LogProbs, scores, world
from jlora.preference.dpo import SYSTEM, dpo

C, R, C0, R0 = np.random.default_rng(0).normal(size=(4, 6)) * 3
LENGTH = jnp.ones(6)


def log_probs(c, r):
    return LogProbs(jnp.asarray(c, jnp.float32), jnp.asarray(r, jnp.float32), LENGTH, LENGTH)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_value_and_gradient_by_numpy(smoothing):
    h = 0.3 * ((C - R) - (C0 - R0))
    want = -(1 - smoothing) * np.log(sigmoid(h)) - smoothing * np.log(sigmoid(-h))

    def loss(c):
        policy = log_probs(C, R)._replace(chosen=c)
        return dpo(policy, log_probs(C0, R0), beta=0.3, smoothing=smoothing)

    c = jnp.asarray(C, jnp.float32)
    np.testing.assert_allclose(loss(c), want, rtol=1e-5)
    slope = -0.3 * ((1 - smoothing) * sigmoid(-h) - smoothing * sigmoid(h))
    np.testing.assert_allclose(jax.grad(lambda c: jnp.sum(loss(c)))(c), slope, atol=1e-6)


def test_training_on_pairs_widens_the_margin_and_the_base_stays():
    at = world(jl.LoRA(2))
    adam = optax.adam(0.05)

    def total(t):
        adapter = at.fresh.replace(trainable=t)
        return jnp.mean(SYSTEM.objective(scores, at.params, adapter, at.batch))

    @jax.jit
    def step(t, state):
        value, g = jax.value_and_grad(total)(t)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(g, state)
        return optax.apply_updates(t, updates), state, value

    t, state = at.fresh.trainable, adam.init(at.fresh.trainable)
    losses = []
    for _ in range(30):
        t, state, value = step(t, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5) and losses[-1] < 0.8 * losses[0]
    tuned = scores(at.params, at.fresh.replace(trainable=t), at.batch)
    base = preference.scores(at.params, None, at.batch)
    assert (np.asarray(tuned.chosen - tuned.rejected) > base.chosen - base.rejected).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"beta": 0.0}, "beta: got 0.0"), ({"smoothing": 0.5}, "smoothing: got 0.5")],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        dpo(log_probs(C, R), log_probs(C0, R0), **given)
