"""PVeRA: the mean is what it merges to, and what is drawn with a key has its mean and deviation."""

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.methods.shared_basis.pvera import PVeRA


def check_value(bench):
    adapter = bench.noisy(PVeRA(rank=3))
    p = bench.numbers(adapter)
    delta = p["basis_a"][:, :3] @ np.diag(p["d"][:3]) @ p["basis_b"] @ np.diag(p["b"])
    bench.agree(adapter, bench.w + delta)


def test_value(bench):
    check_value(bench)


def test_with_a_key_it_is_drawn_around_the_mean(bench):
    adapter = bench.noisy(PVeRA(rank=3))
    p, x = bench.numbers(adapter), np.asarray(bench.x, np.float64)
    tuned = jl.lift(bench.model)
    run = jax.jit(lambda k: tuned(bench.params, adapter, bench.x, ctx={"key": k}))
    drawn = np.asarray(jax.lax.map(run, jax.random.split(jax.random.key(0), 400)))
    inner = x @ p["basis_a"] * p["d"]
    v = p["basis_b"] * p["b"]
    spread = np.sqrt(np.exp(inner[..., 3:]) @ v**2)  # of a sum of independent draws
    mean = x @ bench.w + inner[..., :3] @ v
    assert np.abs(drawn.mean(0) - mean).max() < 0.3 * spread.max()
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.25)


def test_limit_zero_b_is_the_base(bench):
    bench.agree(bench.fresh(PVeRA(rank=2)), bench.w)


def test_refusals():
    with pytest.raises(ValueError, match=r"PVeRA\.rank: got 0, expected an integer of at least 1"):
        PVeRA(rank=0)


def test_mutation_the_variances_for_the_means_are_seen(bench, monkeypatch):
    good = PVeRA.parts

    def swapped(self, p):
        u, v = good(self, p)
        return u[:, ::-1], v

    monkeypatch.setattr(PVeRA, "parts", swapped)
    with pytest.raises(AssertionError):
        check_value(bench)
