"""Block-LoRA: the sum of blocks is the tiled product, and learns as LoRA of the lower rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods import BlockLoRA

METHOD = BlockLoRA(rank=6, alpha=9.0, blocks=3)


def check_value(bench):
    adapter = bench.noisy(METHOD)
    p = bench.numbers(adapter)
    tiled = np.tile(p["a"], (1, 3)) @ p["b"].reshape(6, 8)
    bench.agree(adapter, bench.w + 1.5 * tiled, 5e-5)
    return tiled


def test_value_is_the_tiled_product_of_rank_r_by_n(bench):
    assert np.linalg.matrix_rank(check_value(bench), tol=1e-6) == 2


def test_limit_one_block_is_lora(bench):
    made = bench.noisy(BlockLoRA(rank=2, alpha=3.0, blocks=1)).trainable["w"]
    plain = bench.fresh(jl.LoRA(rank=2, alpha=3.0))
    moved = {"w": {"a": made["a"], "b": made["b"][0]}}
    np.testing.assert_allclose(
        bench.merged(plain.replace(trainable=moved)),
        bench.merged(bench.fresh(BlockLoRA(rank=2, alpha=3.0, blocks=1)).replace(
            trainable={"w": made})), atol=1e-6,
    )  # fmt: skip


def test_gradient_descent_moves_it_as_lora_of_rank_r_by_n_at_n_times_the_rate_of_b(bench):
    """The oracle is LoRA's gradient by hand in float64: dA = s x^T g B^T, dB = s (x A)^T g."""
    adapter, x = bench.fresh(METHOD), np.asarray(bench.x, np.float64).reshape(-1, 12)
    target = np.random.default_rng(3).normal(size=(15, 8))

    def loss(trainable):
        y = jl.lift(bench.model)(bench.params, adapter.replace(trainable=trainable), bench.x)
        return jnp.sum((y.reshape(-1, 8) - jnp.asarray(target, jnp.float32)) ** 2)

    a, b, rate = np.asarray(adapter.trainable["w"]["a"], np.float64), np.zeros((2, 8)), 1e-3
    trainable, grad = adapter.trainable, jax.jit(jax.grad(loss))
    for _ in range(3):
        trainable = jax.tree.map(lambda t, g: t - rate * g, trainable, grad(trainable))
        g = 2 * (x @ (bench.w + 1.5 * a @ b) - target)
        a, b = (a - rate * 1.5 * x.T @ g @ b.T, b - 3 * rate * 1.5 * (x @ a).T @ g)
    found = trainable["w"]
    np.testing.assert_allclose(found["a"], a, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found["b"]).sum(0), b, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found["b"][0], found["b"][2])


def test_refusals():
    with pytest.raises(ValueError, match=r"BlockLoRA\.blocks: got 4, expected a divisor of the"):
        BlockLoRA(rank=6, blocks=4)
    with pytest.raises(ValueError, match=r"BlockLoRA\.rank: got 0, expected an integer of at"):
        BlockLoRA(rank=0)


def test_mutation_a_mean_of_the_blocks_is_seen(bench, monkeypatch):
    good = BlockLoRA.factors
    mean = lambda self, p: good(self, p | {"b": p["b"] / self.blocks})  # noqa: E731
    monkeypatch.setattr(BlockLoRA, "factors", mean)
    with pytest.raises(AssertionError):
        check_value(bench)
