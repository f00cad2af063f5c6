"""FourierFT: a sum of cosines one by one, and numpy's inverse transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.methods.sparse import fourierft
from jlora.methods.sparse.fourierft import FourierFT, transformed


def delta(p):
    i, o = np.arange(12)[:, None], np.arange(8)[None]
    waves = [
        c * np.cos(2 * np.pi * (f * i / 12 + g * o / 8))
        for c, f, g in zip(p["c"], p["rows"], p["cols"], strict=True)
    ]
    return p["scale"] * sum(waves) / 96


def check_value(bench):
    adapter = bench.noisy(FourierFT(count=11, scaling=40.0))
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter)))


def test_value(bench):
    check_value(bench)


def check_one_token(bench):
    """For one token the factors run, not the formed delta."""
    adapter, x = bench.noisy(FourierFT(count=11, scaling=40.0)), bench.x[:1, :1]
    want = np.asarray(x, np.float64) @ (bench.w + delta(bench.numbers(adapter)))
    np.testing.assert_allclose(bench.forward(adapter, x), want, atol=2e-5)


def test_value_of_one_token(bench):
    check_one_token(bench)


@pytest.mark.parametrize("shape", [(6, 8), (7, 5), (1, 4), (5, 1)])
def test_the_transform_and_its_gradient(shape):
    """Of even and odd sides, against numpy's; the map is symmetric."""
    rng, size = np.random.default_rng(0), shape[0] * shape[1]
    flat = rng.permutation(size)[: max(2, size // 2)]
    rows, cols = flat // shape[1], flat % shape[1]
    c, g = rng.normal(size=flat.size), rng.normal(size=shape)
    table = np.zeros(shape)
    table[rows, cols] = c
    arrays = (jnp.asarray(t, jnp.int32) for t in (rows, cols))
    with jax.disable_jit():
        y, back = jax.vjp(lambda c, *i: transformed(c, *i, shape), jnp.float32(c), *arrays)
    np.testing.assert_allclose(y, size * np.fft.ifft2(table).real, atol=1e-5)
    want = size * np.fft.ifft2(g).real[rows, cols]
    np.testing.assert_allclose(back(jnp.float32(g))[0], want, atol=1e-5)


def test_both_forms_have_the_same_gradient(bench, monkeypatch):
    adapter = bench.noisy(FourierFT(count=11, scaling=40.0))

    def gradient():
        loss = lambda t: jnp.sum(jnp.sin(bench.forward(adapter.replace(trainable=t))))  # noqa: E731
        return jax.grad(loss)(adapter.trainable)["w"]["c"]

    formed = gradient()
    monkeypatch.setattr(fourierft.formed, "cheaper", lambda *a, **k: False)
    np.testing.assert_allclose(formed, gradient(), atol=1e-6 * np.abs(formed).max() + 1e-6)


def test_it_is_the_inverse_transform(bench):
    p = bench.numbers(bench.noisy(FourierFT(count=11, scaling=40.0)))
    spectrum = np.zeros((12, 8))
    spectrum[p["rows"].astype(int), p["cols"].astype(int)] = p["c"]
    np.testing.assert_allclose(40.0 * np.fft.ifft2(spectrum).real, delta(p), atol=1e-9)


def test_places_come_from_the_seed_alone(bench):
    one, again, other = (
        bench.numbers(bench.fresh(FourierFT(count=11, seed=seed), seed=key))
        for seed, key in ((777, 0), (777, 1), (778, 0))
    )
    assert np.array_equal(one["rows"], again["rows"]) and np.array_equal(one["cols"], again["cols"])
    assert not np.array_equal(one["rows"], other["rows"])
    assert len(set(zip(one["rows"], one["cols"], strict=True))) == 11


def test_limit_all_coefficients_reach_only_symmetric_spectra(bench):
    """Real coefficients have the real part of the transform: half the dimensions, and some."""
    adapter = bench.noisy(FourierFT(count=96, scaling=96.0))
    change = bench.merged(adapter) - bench.w
    mirrored = np.roll(change[::-1, ::-1], (1, 1), (0, 1))
    np.testing.assert_allclose(mirrored, change, atol=1e-4)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"FourierFT\.count: got 0, expected an integer"):
        FourierFT(count=0)
    with pytest.raises(ValueError, match="w: FourierFT count: got 97, expected at most 96"):
        bench.fresh(FourierFT(count=97))


def test_mutation_a_shifted_transform_is_seen(bench, monkeypatch):
    good = fourierft.cosines
    monkeypatch.setattr(fourierft, "cosines", lambda m: jnp.roll(good(m), 1, axis=0))
    with pytest.raises(AssertionError):
        check_value(bench)


def test_mutation_waves_the_other_way_are_seen(bench, monkeypatch):
    good = FourierFT.waves

    def mirrored(self, p, shape):
        return good(self, p | {"rows": (12 - p["rows"]) % 12}, shape)

    monkeypatch.setattr(FourierFT, "waves", mirrored)
    with pytest.raises(AssertionError):
        check_one_token(bench)
