"""ICM-LoRA's equations: convolutions by torch, the loss by scipy, task vectors by numpy, bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

import jlora as jl
from jlora.contracts import generator
from jlora.generation.codecs.train import draw_params
from jlora.generation.generators import icm_lora
from jlora.generation.generators.icm_lora import CVAE, Conv, ICMLoRAConfig

KEY = jax.random.key(0)
CONFIG = ICMLoRAConfig(channels=(3, 5), latent=2, batch=4)
loss = jax.jit(icm_lora.loss, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(model, params, one, c, method):
    return model.apply({"params": params}, one, c, method=method)


def decode(model, params, z, c):
    return apply(model, params, z, c, "decode")


@pytest.mark.parametrize("up", [False, True])
def test_a_layer_is_torchs_convolution(up):
    rng = np.random.default_rng(0)
    x, w, b = (rng.normal(size=s).astype("f4") for s in ((8, 3), (7, 3, 5), (5,)))
    found = Conv(5, up=up).apply({"params": {"kernel": w, "bias": b}}, jnp.asarray(x))
    given = torch.from_numpy(x.T[None].copy())
    if up:  # torch's transpose writes with a kernel that is turned round
        kernel = torch.from_numpy(w[::-1].transpose(1, 2, 0).copy())
        want = torch.nn.functional.conv_transpose1d(
            given, kernel, torch.from_numpy(b), stride=2, padding=3, output_padding=1
        )
    else:
        kernel = torch.from_numpy(w.transpose(2, 1, 0).copy())
        want = torch.nn.functional.conv1d(given, kernel, torch.from_numpy(b), stride=2, padding=3)
    assert found.shape == ((16, 5) if up else (4, 5))
    np.testing.assert_allclose(found, want[0].numpy().T, atol=1e-5)


@pytest.fixture(scope="module")
def case():
    """A model of 10 numbers with its parameters, adapters and task vectors."""
    model = CVAE(CONFIG, 10)
    rng = np.random.default_rng(1)
    x, c = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 10), (1, 4)))
    params = draw_params(KEY, model, x[0], c[0], jnp.zeros(2))
    return model, params, x, c


def test_the_loss_is_squared_error_and_divergence_of_normals(case):
    model, params, x, c = case
    weights = jnp.asarray([0.0, 0.2] + [0.1] * 8)  # the first number is padding
    found = loss(model, params, KEY, jnp.float32(0), (x, c, weights))
    mu, log_variance = (np.asarray(t, "f8") for t in apply(model, params, x[0], c[0], "encode"))
    sigma = np.exp(log_variance / 2)
    grid = np.linspace(-12, 12, 20_001)
    divergence = sum(
        np.trapezoid(
            scipy.stats.norm.pdf(grid, m, s)
            * (scipy.stats.norm.logpdf(grid, m, s) - scipy.stats.norm.logpdf(grid)), grid)
        for m, s in zip(mu, sigma, strict=True)
    )  # fmt: skip
    noise = np.asarray(jax.random.normal(jax.random.split(KEY)[1], (4, 2)))
    made = [np.asarray(decode(model, params, jnp.asarray(mu + sigma * e, jnp.float32), c[0]))
            for e in noise]  # fmt: skip
    square = [np.sum(np.asarray(weights) * (m - np.asarray(x[0])) ** 2) for m in made]
    assert divergence > 0.01
    np.testing.assert_allclose(found, np.mean(square) + 0.005 * divergence, rtol=1e-5)
    assert 0.005 * divergence > 1e-3 * float(found)  # its weight would be missed


def test_the_decoder_reads_task_vector_and_latent_and_both_matter(case):
    model, params, _, c = case
    one = decode(model, params, jnp.zeros(2), c[0])
    assert one.shape == (10,)
    assert float(jnp.abs(decode(model, params, jnp.ones(2), c[0]) - one).max()) > 1e-3
    assert float(jnp.abs(decode(model, params, jnp.zeros(2), c[0] + 1) - one).max()) > 1e-3


def test_a_task_vector_is_the_mean_state_of_each_class():
    states = np.random.default_rng(2).normal(size=(5, 3)).astype("f4")
    labels = jnp.asarray([1, 0, 1, 1, 0])
    found = icm_lora.task_vector(jnp.asarray(states), labels, 2)
    want = [states[[1, 4]].mean(0), states[[0, 2, 3]].mean(0)]
    np.testing.assert_allclose(found, np.concatenate(want), atol=1e-6)
    with pytest.raises(ValueError, match="got no example of class 2"):
        icm_lora.task_vector(jnp.asarray(states), labels, 3)
    with pytest.raises(ValueError, match=r"expected \(n, d\), \(n,\)"):
        icm_lora.task_vector(jnp.asarray(states), labels[:3], 2)


def test_only_the_decoder_is_kept_and_counted():
    at = generator.world(jl.LoRA(2, freeze_a=True))
    config = dataclasses.replace(CONFIG, steps=1)
    state = icm_lora.fit(KEY, at.conditions, at.groups, at.bank, config)
    assert set(state.params) == {"spread", "up_0", "up_1"}
    # 4 tokens of 12 numbers; q = 12 columns of 5 channels from 2 + 4 numbers
    decoder = (2 + 4 + 1) * 12 * 5 + (7 * 5 * 3 + 3) + (7 * 3 + 1)
    assert icm_lora.size_in_bytes(state) == 4 * (decoder + 4 + 1 + 4 * 12 + 4)
    with pytest.raises(ValueError, match="expected channels, latent and batch"):
        icm_lora.fit(KEY, at.conditions, at.groups, at.bank, ICMLoRAConfig(channels=()))
    with pytest.raises(ValueError, match="all conditions are equal"):
        icm_lora.fit(KEY, jnp.zeros_like(at.conditions), at.groups, at.bank, config)
