"""Samplers: single steps against discrete formulas, whole runs on data with a known denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import paths, samplers
from jlora.generation.diffusion.samplers import Sampler

NAMES = sorted(paths.PATHS)
MEAN, SPREAD = 0.7, 0.5


def gaussian(path):
    """The exact x0 predictor of data N(MEAN, SPREAD^2)."""

    def denoise(z, t):
        alpha, sigma = path(t)
        gain = SPREAD**2 * alpha / ((SPREAD * alpha) ** 2 + sigma**2)
        return MEAN + gain * (z - alpha * MEAN)

    return denoise


def run(path, config, shape=(128, 128), seed=0):
    def one(key):
        return samplers.sample(gaussian(path), key, shape, path, "x0", config)[0]

    return np.asarray(jax.jit(one)(jax.random.key(seed)))


def randoms(count, shape=(4, 3)):
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(count)]


@pytest.mark.parametrize("variance", samplers.VARIANCES)
def test_ddpm_step_is_the_discrete_posterior(variance):
    beta = np.linspace(1e-4, 2e-2, 1000)
    bar = np.cumprod(1.0 - beta)
    z, x0, noise = randoms(3)
    for i in (1, 250, 999):  # 0-based step of the paper's table
        before = bar[i - 1]
        mean = np.sqrt(before) * beta[i] / (1 - bar[i]) * np.asarray(x0, np.float64)
        mean += np.sqrt(1 - beta[i]) * (1 - before) / (1 - bar[i]) * np.asarray(z, np.float64)
        small = beta[i] * (1 - before) / (1 - bar[i])
        spread = np.sqrt(beta[i] if variance == "fixedlarge" else small)
        t, s = jnp.float32((i + 1) / 1000), jnp.float32(i / 1000)
        got = samplers.ddpm_step(paths.ddpm_linear(), variance, z, x0, t, s, noise)
        # at i = 1 the kernel's variance is a difference of numbers near 1e-4
        np.testing.assert_allclose(got, mean + spread * noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_ddim_with_eta_one_is_the_ddpm_posterior(name):
    path, (z, x0, noise) = paths.path(name), randoms(3)
    for t, s in ((1.0, 0.8), (0.5, 0.4), (0.3, 0.0)):
        t, s = jnp.float32(t), jnp.float32(s)
        alpha, sigma = path(t)
        eps = (z - alpha * x0) / sigma
        ddpm = samplers.ddpm_step(path, "fixedsmall", z, x0, t, s, noise)
        ddim = samplers.ddim_step(path, 1.0, x0, eps, t, s, noise)
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-4, atol=2e-5)
        if s > 0:  # the law separates eta = 1 from anything else
            half = samplers.ddim_step(path, 0.5, x0, eps, t, s, noise)
            assert np.abs(half - ddpm).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_keeps_the_marginal(name):
    """Averaged over z_t given x0, a posterior draw is distributed as z_s given x0."""
    path, (x0,) = paths.path(name), randoms(1)
    for t, s in ((1.0, 0.9), (0.6, 0.2)):
        t, s = jnp.float32(t), jnp.float32(s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path(t), path(s)
        zero = jnp.zeros_like(x0)
        mean = samplers.ddpm_step(path, "fixedsmall", alpha_t * x0, x0, t, s, zero)
        np.testing.assert_allclose(mean, alpha_s * x0, rtol=1e-4, atol=1e-5)
        carried = samplers.ddpm_step(path, "fixedsmall", sigma_t + zero, zero, t, s, zero)
        fresh = samplers.ddpm_step(path, "fixedsmall", zero, zero, t, s, 1.0 + zero)
        np.testing.assert_allclose(carried**2 + fresh**2, sigma_s**2 + zero, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_euler_is_ddim_without_noise(name):
    path, (z, x0) = paths.path(name), randoms(2)
    t, s = jnp.float32(0.7), jnp.float32(0.5)
    alpha, sigma = path(t)
    eps = (z - alpha * x0) / sigma
    euler = samplers.flow_step(path, z, eps - x0, t, s)
    ddim = samplers.ddim_step(path, 0.0, x0, eps, t, s, jnp.zeros_like(z))
    np.testing.assert_allclose(euler, ddim, rtol=1e-4, atol=1e-5)
    if name == "rectified_flow":
        np.testing.assert_allclose(euler, z - 0.2 * (eps - x0), rtol=1e-4, atol=1e-5)


CASES = {
    "ddpm_small": Sampler("ddpm", 400, variance="fixedsmall"),
    "ddpm_large": Sampler("ddpm", 400, variance="fixedlarge"),
    "ddim_half": Sampler("ddim", 200, eta=0.5),
    "euler": Sampler("euler", 200),
    "heun": Sampler("heun", 40),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_exact_denoiser_of_a_gaussian_gives_the_gaussian(name, case):
    z = run(paths.path(name), CASES[case])
    # 16,384 draws: standard errors 0.004 and 0.003; the rest is discretisation.
    assert abs(z.mean() - MEAN) < 0.015
    assert abs(z.std() - SPREAD) < 0.02


def order(method):
    """Error of the flow map at 10 steps over that at 20; the linear ODE is solved exactly."""
    path = paths.rectified_flow()
    errors = []
    for steps in (10, 20):
        setting = Sampler(method, steps)
        key = jax.random.key(3)

        def one(key, setting=setting):
            return samplers.sample(gaussian(path), key, (64,), path, "x0", setting, True)

        last, states = jax.jit(one)(key)
        errors.append(np.abs(last - (MEAN + SPREAD * states[0])).max())
    return errors[0] / errors[1]


def test_heun_is_of_second_order_and_euler_of_first(monkeypatch):
    assert 1.7 < order("euler") < 2.3
    assert 3.4 < order("heun") < 4.7
    # A Heun that forgets its corrector is found out.
    monkeypatch.setattr(jax.lax, "cond", lambda test, yes, no: no())
    assert order("heun") < 2.3


def test_clipping_bounds_data_and_state():
    path = paths.ddpm_linear()
    hard = run(path, Sampler("ddpm", 50, clip=0.4), (32, 32))
    assert 0.39 < hard.max() <= 0.4 + 1e-5  # the data reach far beyond
    config = Sampler("ddpm", 50, clip=1.0, clip_state=True)
    walk = jax.jit(
        lambda key: samplers.sample(gaussian(path), key, (16,), path, "x0", config, True)
    )
    _, states = walk(jax.random.key(0))
    assert np.abs(states[1:]).max() <= 1.0 < np.abs(states[0]).max()


def linear(params, z, t, cond, scale):
    del t
    return params * z + scale * cond.mean()


def test_build_is_one_call_for_a_batch():
    path, config = paths.cosine(), Sampler("heun", 3)
    traced = []

    def denoise(*args):
        traced.append(1)
        return linear(*args)

    call = samplers.build(denoise, path, "v", (2, 3), config, trajectory=True)
    keys = jax.random.split(jax.random.key(5), 4)
    cond = jax.random.normal(jax.random.key(6), (4, 1, 2))
    params = jnp.float32(0.3)
    last, states = call(params, keys, cond, jnp.float32(1.0))
    assert last.shape == (4, 2, 3) and states.shape == (4, 4, 2, 3)
    np.testing.assert_array_equal(last, states[:, -1])

    @jax.jit
    def single(key, cond):
        def denoise(z, t):
            return linear(params, z, t, cond, 1.0)

        return samplers.sample(denoise, key, (2, 3), path, "v", config, trajectory=True)

    for i in (0, 3):
        alone, path_alone = single(keys[i], cond[i])
        np.testing.assert_allclose(last[i], alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(states[i], path_alone, rtol=1e-5, atol=1e-6)
    count = len(traced)
    again, _ = call(params, keys, cond, jnp.float32(2.0))  # the scale is data
    assert len(traced) == count
    assert np.abs(again - last).max() > 1e-3
    np.testing.assert_array_equal(call(params, keys, cond, jnp.float32(1.0))[0], last)


def test_impossible_samplers_are_errors():
    for kwargs, text in (
        ({"method": "rk4"}, "'rk4'.*'heun'"),
        ({"variance": "learned"}, "'learned'"),
        ({"steps": 0}, "got 0"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"start": 0.0}, "start=0.0"),
        ({"clip": -1.0}, "-1.0"),
        ({"clip_state": True}, "clip=None"),
    ):
        with pytest.raises(ValueError, match=text):
            Sampler(**kwargs)
    for name in ("cosine", "rectified_flow"):
        with pytest.raises(ValueError, match=f"{name}.*alpha = 0"):
            samplers.build(linear, paths.path(name), "eps", (1, 1), Sampler("ddpm"))
        samplers.build(linear, paths.path(name), "eps", (1, 1), Sampler("ddpm", start=0.99))
    with pytest.raises(ValueError, match="'score'"):
        samplers.build(linear, paths.cosine(), "score", (1, 1), Sampler())
