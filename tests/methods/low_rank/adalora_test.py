"""AdaLoRA's parameterisation: value by numpy, and what one number switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank.adalora import AdaLoRA


def check_value(bench):
    adapter = bench.noisy(AdaLoRA(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    assert p["scale"] == pytest.approx(6.0 / (3 + 1e-5))
    bench.agree(adapter, bench.w + p["scale"] * p["a"] @ np.diag(p["e"]) @ p["b"])


def test_value(bench):
    check_value(bench)


def test_limit_with_all_values_one_it_is_lora(bench):
    adapter = bench.noisy(AdaLoRA(rank=3, alpha=6.0))
    p = adapter.trainable["w"]
    method, scale = jl.LoRA(rank=3, alpha=6.0), adapter.frozen["w"]["scale"]
    lora = {"a": p["a"], "b": p["b"], "scale": scale}
    ones = AdaLoRA(rank=3).merge(bench.params["w"], {**p, "e": jnp.ones(3), "scale": scale})
    np.testing.assert_allclose(ones, method.merge(bench.params["w"], lora), atol=1e-6)


def test_claim_one_number_switches_a_direction_off_and_it_can_come_back(bench):
    adapter = bench.noisy(AdaLoRA(rank=3))
    off = jax.tree.map(lambda t: t, adapter.trainable)
    off["w"]["e"] = off["w"]["e"].at[1].set(0)
    pruned = adapter.replace(trainable=off)
    rank = lambda a: np.linalg.matrix_rank(bench.merged(a) - bench.w, tol=1e-4)  # noqa: E731
    assert (rank(adapter), rank(pruned)) == (3, 2)
    loss = lambda t: bench.forward(adapter.replace(trainable=t)).sum()  # noqa: E731
    g = jax.grad(loss)(pruned.trainable)["w"]
    assert g["e"][1] != 0 and not np.any(g["a"][:, 1]) and not np.any(g["b"][1])


def test_refusals():
    with pytest.raises(ValueError, match=r"AdaLoRA\.rank: got 0, expected an integer"):
        AdaLoRA(rank=0)


def test_mutation_values_on_the_wrong_axis_are_seen(bench, monkeypatch):
    def swapped(self, p):
        e = p["e"][::-1] * p["scale"].astype(p["e"].dtype)
        return p["a"] * e[None, :], p["b"]

    monkeypatch.setattr(AdaLoRA, "factors", swapped)
    with pytest.raises(AssertionError):
        check_value(bench)
