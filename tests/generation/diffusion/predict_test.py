"""Prediction kinds: definitions, conversions both ways, and how their errors scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import paths, predict

PATHS = [make() for make in paths.PATHS.values()]
TIMES = np.asarray([0.02, 0.1, 0.4, 0.7, 0.98], np.float32)


def data():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((len(TIMES), 3, 2)).astype(np.float32) for _ in range(2))


def expected(path, kind, x, noise):
    """The definitions, from alpha and sigma in float64 and a central difference for the rates."""

    def at(t):
        both = jax.vmap(path)(jnp.asarray(t, jnp.float32))
        return [np.asarray(v, np.float64)[:, None, None] for v in both]

    alpha, sigma = at(TIMES)
    step = np.float32(2e-3)
    (alpha_up, sigma_up), (alpha_down, sigma_down) = at(TIMES + step), at(TIMES - step)
    return {
        "eps": noise,
        "x0": x,
        "v": alpha * noise - sigma * x,
        "velocity": ((alpha_up - alpha_down) * x + (sigma_up - sigma_down) * noise) / (2 * step),
    }[kind]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("kind", predict.KINDS)
def test_target_is_its_definition(path, kind):
    x, noise = data()
    got = jax.vmap(lambda x, e, t: predict.target(path, kind, x, e, t))(x, noise, TIMES)
    tolerance = 2e-2 if kind == "velocity" else 1e-5  # the central difference is of second order
    np.testing.assert_allclose(got, expected(path, kind, x, noise), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_all_conversions_agree_with_the_truth(path):
    x, noise = data()

    @jax.vmap
    def errors(x, noise, t):
        z = path.mix(x, noise, t)
        every = {kind: predict.target(path, kind, x, noise, t) for kind in predict.KINDS}
        return {
            f"{a}->{b}": jnp.abs(predict.convert(path, a, b, every[a], z, t) - every[b]).max()
            / (1.0 + jnp.abs(every[b]).max())
            for a, b in itertools.product(predict.KINDS, repeat=2)
        }

    for name, error in errors(x, noise, TIMES).items():
        # eps <-> x0 near an end divides a rounding error by a small alpha or sigma
        assert error.max() < 3e-3, (name, error)
        assert error[1:4].max() < 3e-5, (name, error)


def test_the_conversion_check_sees_a_wrong_sign():
    x, noise = (v[2] for v in data())
    path, t = paths.cosine(), jnp.float32(0.4)
    wrong = -predict.target(path, "v", x, noise, t)
    x0, _ = predict.estimates(path, "v", wrong, path.mix(x, noise, t), t)
    assert np.abs(x0 - x).max() > 0.1


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_error_ratio_is_what_a_wrong_x0_costs(path):
    x, noise = (v[2] for v in data())
    off, t = x + np.float32(0.3), jnp.float32(0.4)
    z = path.mix(x, noise, t)
    for kind in predict.KINDS:
        told = predict.convert(path, "x0", kind, off, z, t)
        cost = jnp.mean((told - predict.target(path, kind, x, noise, t)) ** 2)
        ratio = predict.error_ratio(path, kind, t)
        np.testing.assert_allclose(cost / 0.09, ratio, rtol=1e-4)


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"'noise'.*'eps'"):
        predict.target(paths.cosine(), "noise", jnp.ones(1), jnp.ones(1), jnp.float32(0.5))
