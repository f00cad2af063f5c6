"""WaveFT: Haar's matrices written out, odd sides, and entries where there is no wavelet."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.methods.sparse import waveft
from jlora.methods.sparse.waveft import WaveFT, analysis, synthesis


def haar(d):
    half, out = (d + 1) // 2, np.zeros((d + d % 2, d + d % 2))
    for k in range(half):
        out[2 * k, k] = out[2 * k + 1, k] = out[2 * k, half + k] = np.sqrt(0.5)
        out[2 * k + 1, half + k] = -np.sqrt(0.5)
    return out[:d]


def check_value(bench, wavelet=True):
    adapter = bench.noisy(WaveFT(count=13, scaling=3.0, wavelet=wavelet))
    p, table = bench.numbers(adapter), np.zeros((12, 8))
    table[p["rows"].astype(int), p["cols"].astype(int)] = p["c"]
    left, right = (haar(12), haar(8)) if wavelet else (np.eye(12), np.eye(8))
    bench.agree(adapter, bench.w + 3.0 * left @ table @ right.T)


@pytest.mark.parametrize("wavelet", [True, False])
def test_value(bench, wavelet):
    check_value(bench, wavelet)


def check_one_token(bench):
    """For one token the coefficients are multiplied one by one."""
    adapter, x = bench.noisy(WaveFT(count=13, scaling=3.0)), bench.x[:1, :1]
    p, table = bench.numbers(adapter), np.zeros((12, 8))
    table[p["rows"].astype(int), p["cols"].astype(int)] = p["c"]
    want = np.asarray(x, np.float64) @ (bench.w + 3.0 * haar(12) @ table @ haar(8).T)
    np.testing.assert_allclose(bench.forward(adapter, x), want, atol=2e-5)


def test_value_of_one_token(bench):
    check_one_token(bench)


def test_limit_the_transform_inverts_and_keeps_lengths():
    rng = np.random.default_rng(0)
    for d in (6, 7):
        x = jnp.asarray(rng.normal(size=(3, d)), jnp.float32)
        there = analysis(x)
        np.testing.assert_allclose(there, np.asarray(x) @ haar(d), atol=1e-6)
        np.testing.assert_allclose(synthesis(there, d), x, atol=1e-6)
        np.testing.assert_allclose(jnp.sum(there**2), jnp.sum(x**2), rtol=1e-5)


def test_odd_sides():
    rng = np.random.default_rng(1)
    rows, cols = waveft.places(7, 5, 20, 777, True)
    assert rows.max() < 8 and cols.max() < 6 and len(set(zip(rows, cols, strict=True))) == 20
    p = {"rows": jnp.asarray(rows), "cols": jnp.asarray(cols), "scale": jnp.float32(2)}
    p["c"] = jnp.asarray(rng.normal(size=20), jnp.float32)
    table = np.zeros((8, 6))
    table[rows, cols] = p["c"]
    got = WaveFT(count=20).merge(jnp.zeros((7, 5)), p)
    np.testing.assert_allclose(got, 2 * haar(7) @ table @ haar(5).T, atol=1e-5)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"WaveFT\.count: got 0, expected an integer"):
        WaveFT(count=0)
    with pytest.raises(ValueError, match="w: WaveFT count: got 97, expected at most 96"):
        bench.fresh(WaveFT(count=97))


def test_mutation_sums_for_differences_are_seen(bench, monkeypatch):
    good = waveft.analysis
    monkeypatch.setattr(waveft, "analysis", lambda x: jnp.roll(good(x), x.shape[-1] // 2, -1))
    with pytest.raises(AssertionError):
        check_one_token(bench)


def test_mutation_a_transform_not_inverted_is_seen(bench, monkeypatch):
    good = waveft.synthesis
    monkeypatch.setattr(waveft, "synthesis", lambda x, d: jnp.roll(good(x, d), 1, -1))
    with pytest.raises(AssertionError):
        check_value(bench)
