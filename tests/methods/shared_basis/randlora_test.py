"""RandLoRA: the sum of products one by one, on both sides of square, and its rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.core.method import Method
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


def temporary(method):
    """Bytes that XLA needs for a gradient through eight layers of 96 x 96."""
    params, x = {"w": jnp.ones((8, 96, 96)) / 96}, jnp.ones((2, 96))

    def model(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0].sum()

    adapter = jl.init(jax.random.key(0), model, params, x, methods={"w": method})
    value = lambda t: jl.lift(model)(params, adapter.replace(trainable=t), x)  # noqa: E731
    compiled = jax.jit(jax.grad(value)).lower(adapter.trainable).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_backward_pass_keeps_no_scaled_bases(monkeypatch):
    """By XLA's account; with the default path there is one of the weight's size per layer."""
    method, layer = RandLoRA(rank=8, alpha=8.0), 96 * 96 * 4
    lean = temporary(method)
    monkeypatch.setattr(RandLoRA, "apply", Method.apply)
    assert temporary(method) > lean + 6 * layer, lean / layer


def test_gradients_are_those_of_the_sum(bench):
    """By NumPy: the delta is linear in each weight, so its derivative is the delta of 1."""
    adapter = bench.noisy(RandLoRA(rank=3, alpha=1.5))
    p = bench.numbers(adapter)
    g = np.random.default_rng(2).normal(size=(3, 5, 8))

    def value(t):
        y = jl.lift(bench.model)(bench.params, adapter.replace(trainable=t), bench.x)
        return jnp.vdot(y, jnp.asarray(g, jnp.float32))

    got = jax.jit(jax.grad(value))(adapter.trainable)["w"]
    dense = np.einsum("abi,abo->io", np.asarray(bench.x, np.float64), g)
    for name in ("lam", "gamma"):
        for at in np.ndindex(p[name].shape):
            one = np.zeros_like(p[name])
            one[at] = 1.0
            expected = np.vdot(dense, delta(p | {name: one}, 12, 8))
            np.testing.assert_allclose(got[name][at], expected, rtol=1e-4, atol=1e-3)


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
