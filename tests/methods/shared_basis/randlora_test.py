"""RandLoRA: the sum of products one by one, on both sides of square, and its rank."""

import dataclasses

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.methods.shared_basis.randlora import RandLoRA


def delta(p, d_in, d_out):
    """[d_in, d_out]: row k N + j of the scaled A with that column of B as it lies in memory."""
    (rank, count), small, large = p["lam"].shape, min(d_in, d_out), max(d_in, d_out)
    flat = p["basis_b"][:large, :count].reshape(large, -1)
    out = np.zeros((large, small))
    for k in range(rank):
        for j in range(count):
            row = p["lam"][k, j] * p["basis_a"][k, :small] * p["gamma"][j]
            out += np.outer(flat[:, k * count + j], row)
    return p["scale"] * (out if d_in >= d_out else out.T)


def check_value(bench):
    adapter = bench.noisy(RandLoRA(rank=3, alpha=1.0))
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter), 12, 8), 5e-5)


def test_value(bench):
    check_value(bench)


def test_few_numbers_of_full_rank(bench):
    adapter = bench.noisy(RandLoRA(rank=3, alpha=3.0))
    assert {k: v.shape for k, v in adapter.trainable["w"].items()} == {
        "lam": (3, 3),
        "gamma": (3, 8),
    }
    assert np.linalg.matrix_rank(bench.merged(adapter) - bench.w, tol=1e-4) == 8


def test_sites_of_other_shapes_share_one_pair_of_bases(bench):
    narrow = dataclasses.replace(bench.site, path="n", shape=(5, 9), group="*0")
    method = RandLoRA(rank=2, alpha=2.0)
    sites = [(dataclasses.replace(bench.site, group="*0"), method), (narrow, method)]
    params = bench.params | {"n": np.zeros((5, 9), np.float32)}
    adapter = initialise(jax.random.key(0), sites, params)
    assert adapter.frozen["*0"]["basis_a"].shape == (2, 9)
    lam = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    own = adapter.trainable["n"] | {"lam": lam}
    tuned = adapter.replace(trainable=adapter.trainable | {"n": own})
    p = {**adapter.frozen["*0"], **adapter.frozen["n"], **own}
    p = {k: np.asarray(v, np.float64) for k, v in p.items()}
    np.testing.assert_allclose(jl.merge(params, tuned)["n"], delta(p, 5, 9), atol=1e-4)


def test_limit_zero_weights_are_the_base(bench):
    bench.agree(bench.fresh(RandLoRA(rank=4)), bench.w)


def test_refusals():
    with pytest.raises(ValueError, match=r"RandLoRA\.rank: got 0, expected an integer"):
        RandLoRA(rank=0)


def test_mutation_another_pairing_is_seen(bench, monkeypatch):
    good = RandLoRA.factors

    def paired(self, p):
        return good(self, p | {"basis_b": p["basis_b"].swapaxes(1, 2)})

    monkeypatch.setattr(RandLoRA, "factors", paired)
    with pytest.raises(AssertionError):
        check_value(bench)
