"""The training loop: numpy's gradient descent, resuming bitwise, and clear failures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.generation.codecs import train as codec_train
from jlora.generation.codecs.train import Problem

KEY = jax.random.key(7)
X = jnp.asarray(np.random.default_rng(0).normal(size=(10, 2, 3)).astype("f4"))
START = {"w": jnp.ones((2, 3))}


class Nothing(nn.Module):
    """The problems here need no model."""


def noisy(model, view, params, key, x):
    """Draws the rows towards w; the noise makes the order of keys matter."""
    error = x - params["w"][None] + view * jax.random.normal(key, x.shape)
    value = jnp.mean(jnp.square(error))
    return value, {"mse": value}


def adam(model):
    return optax.adam(0.1)


def run(loss=noisy, steps=12, chunk=4, batch=4, optimizer=adam, **more):
    problem = Problem(Nothing(), loss, optimizer)
    return codec_train.train(
        problem, START, X, KEY, steps=steps, chunk=chunk, batch=batch, view=0.1, **more
    )


def test_resumed_is_undisturbed_bitwise():
    seen = []
    whole = run(callback=lambda state, metrics: seen.append((state, metrics)))
    assert [int(state.step) for state, _ in seen] == [4, 8, 12]
    assert [m["loss"].shape for _, m in seen] == [(4,)] * 3
    assert whole.history["mse"].shape == (12,)
    saved = jax.tree.map(np.asarray, seen[0][0])  # as from a checkpoint
    resumed = run(resume=saved)
    assert jax.tree.all(jax.tree.map(np.array_equal, resumed.train, whole.train))
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"][4:])
    # Mutation: resumed with its step forgotten, it takes other minibatches and noise.
    wrong = run(resume=saved._replace(step=jnp.zeros((), jnp.int32)), steps=8)
    assert not np.array_equal(wrong.train.params["w"], whole.train.params["w"])
    # Nothing left to do: the state comes back and there is no history.
    assert run(resume=whole.train).history == {}


def test_full_batch_against_numpy():
    def plain(model, view, params, key, x):
        return jnp.mean(jnp.square(x - params["w"][None])), {}

    info = run(plain, steps=5, batch=99, chunk=2, optimizer=lambda model: optax.sgd(0.5))
    w, losses = np.ones((2, 3)), []
    for _ in range(5):
        losses.append(np.mean((np.asarray(X) - w) ** 2))
        w = w - 0.5 * 2 * np.mean(w - np.asarray(X), axis=0) / w.size
    np.testing.assert_allclose(info.history["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(info.train.params["w"], w, rtol=1e-5)


def test_draw_params():
    """Bounds 1 / sqrt(fan-in) for layers, unit variance for what is no layer."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            site = self.param("site", nn.initializers.zeros_init(), (40, 50))
            return nn.Dense(64, name="dense")(x) + site.sum()

    params = codec_train.draw_params(KEY, Net(), jnp.ones((1, 25)))
    assert params["dense"]["kernel"].shape == (25, 64)
    for leaf in params["dense"].values():
        assert 0.15 < np.abs(leaf).max() <= 0.2
    np.testing.assert_allclose(np.std(params["site"]), 1, atol=0.05)
    np.testing.assert_allclose(np.mean(params["site"]), 0, atol=0.1)


def test_failures():
    def broken(model, view, params, key, x):
        value = jnp.sum(jnp.log(params["w"] - 0.75))  # adam takes 0.1 a step: -inf or NaN soon
        return value, {}

    with pytest.raises(FloatingPointError, match=r"not finite at step [23]"):
        run(broken)
    with pytest.raises(ValueError, match="must be positive, got 0, 4, 4"):
        run(steps=0)


def test_two_fits_of_one_kind_compile_once():
    traces = []

    def counted(model, view, params, key, x):
        traces.append(1)
        return noisy(model, view, params, key, x)

    run(counted, steps=4)
    run(counted, steps=8)  # another length of training, the same chunk
    assert len(traces) == 1
    run(counted, steps=8, chunk=8)
    assert len(traces) == 2
