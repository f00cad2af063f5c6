"""The parameter average against its recursion in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.generation.diffusion import ema


def test_average_is_the_corrected_recursion_of_the_parameters():
    decay, rate = 0.8, 0.25
    optimizer = optax.chain(optax.sgd(rate), ema.average(decay))
    params = {"w": jnp.asarray([1.0, -2.0])}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda w: 2.0 * w, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    w, moment = np.asarray([1.0, -2.0]), np.zeros(2)
    for k in range(1, 6):
        params, state = step(params, state)
        w = w - rate * 2.0 * w
        moment = decay * moment + (1 - decay) * w
        np.testing.assert_allclose(params["w"], w, rtol=1e-6)  # the updates pass unchanged
        np.testing.assert_allclose(ema.averaged(state)["w"], moment / (1 - decay**k), rtol=1e-5)
        if k == 1:  # an average of gradients or of old parameters would not be this
            np.testing.assert_allclose(ema.averaged(state)["w"], w, rtol=1e-5)


def test_constant_parameters_are_their_own_average():
    tool, params = ema.average(0.999), {"w": jnp.asarray([3.0])}
    state, zero = tool.init(params), {"w": jnp.zeros(1)}
    for _ in range(3):
        _, state = tool.update(zero, state, params)
    np.testing.assert_allclose(ema.averaged(state)["w"], [3.0], rtol=1e-4)


def test_misuse_is_an_error():
    with pytest.raises(ValueError, match=r"1\.0"):
        ema.average(1.0)
    params = {"w": jnp.ones(1)}
    tool = ema.average(0.9)
    with pytest.raises(ValueError, match="needs params"):
        tool.update(params, tool.init(params))
    with pytest.raises(ValueError, match="got 0 averages"):
        ema.averaged(optax.sgd(0.1).init(params))
    twice = optax.chain(tool, tool)
    with pytest.raises(ValueError, match="got 2 averages"):
        ema.averaged(twice.init(params))
