"""Token autoencoder: its loss by numpy, constant data, unit latents, site by site."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.audit.delta_error import DeltaView
from jlora.generation.codecs import token as codec_token
from jlora.generation.codecs.token import TokenAE, TokenAEConfig
from jlora.generation.tokens import site_tokens as tokens

KEY = jax.random.key(0)
CONFIG = TokenAEConfig(
    latent=4, width=24, depth=1, embed=4, steps=300, chunk=100, batch=8, learning_rate=1e-2
)
SPEC = tokens.from_tree({"p": {"b": jnp.ones((2, 2, 5))}, "q": {"b": jnp.ones((2, 5))}})
FROZEN = {
    "p": {"a": jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 2)).astype("f4"))},
    "q": {"a": jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)).astype("f4"))},
}
VIEW = DeltaView(SPEC, None, FROZEN)


def zoo(n=16, rank=2):
    """Adapters on a plane: two numbers say all about each token."""
    rng = np.random.default_rng(0)
    plane, where = rng.normal(size=(3, rank, 10)), rng.uniform(-1.7, 1.7, size=(n, 3, rank))
    return jnp.asarray(np.einsum("ntr,trd->ntd", where, plane).astype("f4"))


@pytest.fixture(scope="module")
def fitted():
    x = zoo()
    state, info = codec_token.fit(KEY, x, CONFIG, view=VIEW)
    z = jax.jit(jax.vmap(codec_token.encode, (None, 0)))(state, x)
    x_hat = jax.jit(jax.vmap(codec_token.decode, (None, 0)))(state, z)
    return np.asarray(x), state, info, z, np.asarray(x_hat)


def test_learns(fitted):
    x, _, info, z, x_hat = fitted
    assert z.shape == (16, 3, 4) and x_hat.shape == x.shape
    relative = np.linalg.norm(x_hat - x) / np.linalg.norm(x)
    assert relative < 0.35, relative
    assert info.history["loss"][-20:].mean() < 0.25 * info.history["loss"][0]
    # Mutation: decoded from another adapter's latents it is far off.
    assert np.linalg.norm(x_hat - np.roll(x, 1, 0)) / np.linalg.norm(x) > 0.8


def test_latents_have_unit_scale(fitted):
    z = fitted[3]
    np.testing.assert_allclose(np.mean(z, 0), 0, atol=1e-4)
    assert np.all(np.std(z, 0) < 1.001)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(z))), 1, atol=0.1)


def test_decode_is_differentiable(fitted):
    _, state, _, z, _ = fitted
    grad = jax.jit(jax.grad(lambda z: jnp.sum(jnp.square(codec_token.decode(state, z)))))(z[0])
    assert np.all(np.isfinite(grad)) and np.all(np.any(grad != 0, axis=1))
    other = z[0].at[1].add(1.0)  # tokens do not mix
    moved = np.asarray(jax.jit(codec_token.decode)(state, other)) - fitted[4][0]
    assert np.abs(moved[1]).max() > 0.1 and np.abs(moved[[0, 2]]).max() < 1e-5


def test_loss_against_numpy():
    """Without noise the loss is the docstring's formula, with dense deltas in float64."""
    config = dataclasses.replace(CONFIG, input_noise=0.0, latent_noise=0.0, cos_weight=2.0)
    state = codec_token.init(KEY, config, 3, 10)
    model, x = TokenAE(config, 3, 10), zoo(4)
    run = jax.jit(lambda p: codec_token.losses(model, VIEW, p, KEY, x))
    total, parts = run(state.params)
    forward = jax.jit(jax.vmap(lambda v: model.apply({"params": state.params}, v)))
    x_hat = np.asarray(forward(x), "f8")
    a = np.concatenate([FROZEN["p"]["a"], FROZEN["q"]["a"][None]]).astype("f8")
    d, d_hat = (a @ np.asarray(t, "f8").reshape(4, 3, 2, 5) for t in (x, x_hat))
    norm, norm_hat = ((t**2).sum((2, 3)) for t in (d, d_hat))
    least = 1e-3 * norm.mean()
    delta = np.mean(((d_hat - d) ** 2).sum((2, 3)) / (norm + least))
    cos = (d * d_hat).sum((2, 3)) / np.sqrt((norm + least) * (norm_hat + least))
    mse = np.mean((x_hat - np.asarray(x)) ** 2)
    np.testing.assert_allclose(parts["delta"], delta, rtol=1e-4)
    np.testing.assert_allclose(parts["one_minus_cos"], np.mean(1 - cos), rtol=1e-4)
    np.testing.assert_allclose(parts["mse"], mse, rtol=1e-4)
    np.testing.assert_allclose(total, delta + 2 * np.mean(1 - cos) + mse, rtol=1e-4)


def test_constant_zoo_comes_back():
    x = jnp.broadcast_to(zoo()[:1], (16, 3, 10))
    state, _ = codec_token.fit(KEY, x, CONFIG, view=VIEW)
    z = jax.jit(codec_token.encode)(state, x[0])
    assert np.abs(z).max() < 0.5  # no rounding errors blown up
    back = jax.jit(codec_token.decode)(state, z)
    np.testing.assert_allclose(back, x[0], atol=0.1)


def test_errors():
    with pytest.raises(ValueError, match=r"adapters \[1\] of 16"):
        codec_token.fit(KEY, zoo().at[1, 0, 0].set(jnp.nan), CONFIG)
