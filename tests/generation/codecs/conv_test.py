"""The paper's autoencoder: torch layers agree, the paper's sizes come out, norms get lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jlora.generation.codecs import conv as codec_conv
from jlora.generation.codecs.conv import ConvAE, ConvAEConfig

KEY = jax.random.key(0)
SMALL = ConvAEConfig(
    enc_channels=(2, 3), dec_channels=(3, 6), steps=150, chunk=50, learning_rate=1e-2
)
T, D = 4, 15  # K = 60, padded to 75: two latent columns


def zoo(n=6):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, T, D)).astype("f4"))


@pytest.fixture(scope="module")
def fitted():
    """One fit on constant data."""
    x = jnp.broadcast_to(zoo(1), (6, T, D))
    return x, *codec_conv.fit(KEY, x, SMALL)


def torch_layer(kind, p):
    """The torch layer with our kernel [5, in, out] in its own layout, and its bias."""
    kernel = torch.from_numpy(np.array(p["kernel"]))
    cls = torch.nn.ConvTranspose1d if kind == "up" else torch.nn.Conv1d
    order = (1, 2, 0) if kind == "up" else (2, 1, 0)
    layer = cls(*kernel.shape[1:], 5, stride=1 if kind == "same" else 5)
    layer.weight.data = kernel.permute(*order).contiguous()
    layer.bias.data = torch.from_numpy(np.array(p["bias"]))
    return layer


def test_layers_against_torch():
    params = codec_conv.init(KEY, SMALL, T, D).params
    model, x = ConvAE(SMALL, T * D), zoo(1).reshape(-1)
    run = model.bind({"params": params})
    z, back = jax.jit(lambda x: (run.encode(x), run(x)))(x)
    leaky = torch.nn.LeakyReLU()
    with torch.no_grad():
        h = torch.zeros(1, 1, 75)
        h[0, 0, :60] = torch.from_numpy(np.array(x))
        for i in range(2):
            h = leaky(h) if i else h
            same = torch_layer("same", params[f"enc_same_{i}"])
            same.padding = (1,)
            down = torch_layer("down", params[f"enc_down_{i}"])
            h = down(_norm(leaky(same(_norm(h)))))
        h = torch.tanh(h)
        np.testing.assert_allclose(z, h[0].T.numpy(), atol=1e-5)
        for i in range(2):
            up = torch_layer("up", params[f"dec_up_{i}"])
            same = torch_layer("same", params[f"dec_same_{i}"])
            same.padding = (4 if i == 0 else 5,)
            h = same(_norm(leaky(up(_norm(leaky(h))))))
        assert h.shape == (1, 1, 76)  # one more than the padded input
        np.testing.assert_allclose(back, h[0, 0, :60].numpy(), atol=1e-4)


def _norm(h):
    return torch.nn.functional.instance_norm(h)


@pytest.mark.parametrize(
    ("numbers", "columns"), [(147_456, 235), (1_179_648, 1887), (73_728, 117), (92_160, 147)]
)
def test_latent_sizes_of_the_paper(numbers, columns):
    config = ConvAEConfig()
    state = jax.eval_shape(lambda k: codec_conv.init(k, config, 1, numbers), KEY)
    x = jax.ShapeDtypeStruct((1, numbers), jnp.float32)
    z = jax.eval_shape(codec_conv.encode, state, x)
    assert z.shape == (columns, 4)
    assert jax.eval_shape(codec_conv.decode, state, z).shape == (1, numbers)


def test_constant_zoo_comes_back(fitted):
    x, state, info = fitted
    back = jax.jit(codec_conv.decode)(state, jax.jit(codec_conv.encode)(state, x[0]))
    error = np.mean((back - x[0]) ** 2) / np.mean(x[0] ** 2)
    assert error < 0.2, error
    assert info.history["loss"].shape == (150,)
    assert info.history["loss"][-1] < 0.3 * info.history["loss"][0]


def test_latents_raw_and_standardised(fitted):
    """Two ends of one training: no steps are left, so only the latents' statistics are taken."""
    _, _, info = fitted
    x, encode = zoo(), jax.jit(jax.vmap(codec_conv.encode, (None, 0)))
    raw_config = dataclasses.replace(SMALL, standardise=False)
    raw, more = codec_conv.fit(KEY, x, raw_config, resume=info.train)
    assert more.history == {}
    z = encode(raw, 100 * x)
    assert z.shape == (6, 2, 3) and np.abs(z).max() <= 1
    assert np.all(raw.mean == 0) and np.all(raw.scale == 1)
    unit, _ = codec_conv.fit(KEY, x, SMALL, resume=info.train)
    z = encode(unit, x)
    np.testing.assert_allclose(np.mean(z, 0), 0, atol=1e-4)
    np.testing.assert_allclose(np.mean(np.square(z), (0, 1)), 1, rtol=1e-3)


def test_norm_is_lost_at_the_door(monkeypatch):
    """The docstring's claim: an adapter and ten times it have one latent."""
    state, x = codec_conv.init(KEY, SMALL, T, D), zoo()[0]
    both = lambda: jax.jit(jax.vmap(lambda v: codec_conv.encode(state, v)))(  # noqa: E731
        jnp.stack([x, 10 * x])
    )
    small, large = both()
    np.testing.assert_allclose(large, small, atol=1e-3)
    monkeypatch.setattr(codec_conv, "instance_norm", lambda h: h)
    small, large = both()
    assert np.abs(large - small).max() > 0.05


def test_loss_and_noise_against_numpy(monkeypatch):
    """The noise enters as (1 - s) x + s n, the latent is clipped, the loss is the mean square."""
    state, x = codec_conv.init(KEY, SMALL, T, D), zoo().reshape(6, -1)
    model = ConvAE(SMALL, T * D)
    monkeypatch.setattr(codec_conv.jax.random, "normal", lambda k, s, d: jnp.full(s, 30.0, d))
    got, _ = jax.jit(lambda x: codec_conv.losses(model, None, state.params, KEY, x))(x)
    run = model.bind({"params": state.params})
    z = jax.jit(jax.vmap(run.encode))(0.999 * x + 0.03)
    want = jax.jit(jax.vmap(run.decode))(jnp.clip(0.9 * z + 3.0, -1, 1))
    np.testing.assert_allclose(got, np.mean((np.asarray(want) - np.asarray(x)) ** 2), rtol=1e-5)


def test_errors():
    bad = dataclasses.replace(SMALL, dec_channels=(4, 6))
    with pytest.raises(ValueError, match=r"channels \(2, 3\) and \(4, 6\)"):
        codec_conv.init(KEY, bad, T, D)
    with pytest.raises(ValueError, match="24 numbers are too few for 2 blocks"):
        codec_conv.init(KEY, SMALL, 4, 6)
    with pytest.raises(ValueError, match=r"adapters \[0\] of 6"):
        codec_conv.fit(KEY, zoo().at[0].set(jnp.nan), SMALL)
