"""Noise paths against the discrete DDPM table, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import paths

NAMES = sorted(paths.PATHS)


def curve(path, t):
    return tuple(np.asarray(x, np.float64) for x in jax.vmap(path)(jnp.asarray(t, jnp.float32)))


def ddpm_alpha():
    beta = np.linspace(1e-4, 2e-2, 1000)
    return np.sqrt(np.cumprod(1.0 - beta))


def test_ddpm_linear_is_the_discrete_table():
    alpha, sigma = curve(paths.ddpm_linear(), np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(alpha, ddpm_alpha(), rtol=5e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1.0 - ddpm_alpha() ** 2), rtol=2e-4)


def test_the_table_check_sees_an_index_off_by_one():
    alpha, _ = curve(paths.ddpm_linear(), np.arange(0, 1000) / 1000)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(alpha, ddpm_alpha(), rtol=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ends_and_monotone_signal(name):
    alpha, sigma = curve(paths.path(name), np.linspace(0, 1, 501))
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    np.testing.assert_allclose(sigma[-1], 1.0, atol=3e-5)
    assert np.all(np.diff(alpha) < 0) and np.all(np.diff(sigma) > 0)
    if name != "rectified_flow":
        np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    if name != "ddpm_linear":
        assert alpha[-1] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_the_derivatives(name):
    path, step = paths.path(name), 1e-3
    t = np.asarray([0.05, 0.312, 0.6, 0.95]) + 0.5 * step  # inside a step of the table
    rates = jax.vmap(path.rates)(jnp.asarray(t, jnp.float32))
    if name == "cosine":
        expected = (-np.pi / 2 * np.sin(np.pi * t / 2), np.pi / 2 * np.cos(np.pi * t / 2))
    elif name == "rectified_flow":
        expected = (-np.ones(4), np.ones(4))
    else:
        table = np.concatenate([[1.0], ddpm_alpha()])
        left = np.floor(t * 1000).astype(int)
        alpha = np.sqrt(table[left] * table[left + 1])  # log alpha is linear in between
        slope = alpha * np.log(table[left + 1] / table[left]) / step
        expected = (slope, -alpha * slope / np.sqrt(1 - alpha**2))
    for got, want in zip(rates, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4)


def test_mix_is_the_interpolation():
    x, noise = np.asarray([1.0, -2.0], np.float32), np.asarray([0.5, 4.0], np.float32)
    z = paths.rectified_flow().mix(jnp.asarray(x), jnp.asarray(noise), jnp.float32(0.25))
    np.testing.assert_allclose(z, 0.75 * x + 0.25 * noise, rtol=1e-6)


def test_bad_names_and_tables_are_errors():
    with pytest.raises(ValueError, match=r"'linear'.*cosine"):
        paths.path("linear")
    with pytest.raises(ValueError, match="steps=0"):
        paths.ddpm_linear(steps=0)
    with pytest.raises(ValueError, match=r"beta_max=1.5"):
        paths.ddpm_linear(beta_max=1.5)
