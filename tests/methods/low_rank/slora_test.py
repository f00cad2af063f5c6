"""SLoRA: a square matrix between the factors."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank.slora import SLoRA


def check_value(bench):
    adapter = bench.noisy(SLoRA(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    bench.agree(adapter, bench.w + 2 * p["a"] @ p["core"] @ p["b"])


def test_value(bench):
    check_value(bench)


def test_it_starts_at_the_base_with_draws_of_the_bounds(bench):
    adapter = bench.fresh(SLoRA(rank=4))
    p = bench.numbers(adapter)
    np.testing.assert_array_equal(bench.merged(adapter), bench.w)
    assert 0.8 / 12**0.5 < np.abs(p["a"]).max() <= 1 / 12**0.5
    assert 0.6 / 2 < np.abs(p["core"]).max() <= 1 / 2


def test_limit_a_core_of_the_identity_is_lora(bench):
    adapter, lora = bench.noisy(SLoRA(rank=3)), bench.fresh(jl.LoRA(rank=3))
    p = adapter.trainable["w"]
    same = adapter.replace(trainable={"w": {**p, "core": jnp.eye(3)}})
    lora = lora.replace(trainable={"w": {"a": p["a"], "b": p["b"]}})
    np.testing.assert_allclose(bench.merged(same), bench.merged(lora), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"SLoRA\.rank: got 0"):
        SLoRA(rank=0)


def test_mutation_a_transposed_core_is_seen(bench, monkeypatch):
    monkeypatch.setattr(
        SLoRA, "factors", lambda self, p: (p["scale"] * p["a"] @ p["core"].T, p["b"])
    )
    with pytest.raises(AssertionError):
        check_value(bench)
