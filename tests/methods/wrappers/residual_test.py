"""A method minus its start: the base at the start, the difference after it."""

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank.lora_xs import LoRAXS
from jlora.methods.wrappers.residual import Residual


def check_value(bench):
    adapter = bench.noisy(Residual(jl.LoRA(rank=3, alpha=6.0)))
    b0 = bench.noisy(jl.LoRA(rank=3)).trainable["w"]["b"]
    adapter = adapter.replace(frozen={"w": {**adapter.frozen["w"], "b0": b0}})
    p = bench.numbers(adapter)
    assert np.abs(p["a0"] @ p["b0"]).max() > 0.1
    bench.agree(adapter, bench.w - 2 * p["a0"] @ p["b0"] + 2 * p["a"] @ p["b"])


def test_value(bench):
    check_value(bench)


def test_a_start_that_is_not_zero_is_exactly_the_base(bench):
    for method in (LoRAXS(rank=3), jl.SLoRA(rank=3), jl.LoRA(rank=3)):
        adapter = bench.noisy(method)
        p = adapter.frozen["w"] | {f"{k}0": t for k, t in adapter.trainable["w"].items()}
        (site, _) = adapter.sites[0]
        whole = adapter.replace(frozen={"w": p}, sites=((site, Residual(method)),))
        assert np.abs(bench.merged(adapter) - bench.w).max() > 0.1
        np.testing.assert_array_equal(bench.merged(whole), bench.w)


def test_dropout_is_of_what_is_trained(bench):
    """The mean over keys is the value without dropout; one key's is not."""
    adapter = bench.noisy(Residual(jl.LoRA(rank=2, dropout=0.5)))
    tuned = jl.lift(bench.model)
    plain = tuned(bench.params, adapter, bench.x)
    many = jax.vmap(lambda k: tuned(bench.params, adapter, bench.x, ctx={"key": k}))(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert np.abs(many[0] - plain).max() > 0.1
    np.testing.assert_allclose(many.mean(0), plain, atol=0.15)


def test_refusals():
    with pytest.raises(ValueError, match="Residual: expected a method with factors, got DoRA"):
        Residual(jl.DoRA(rank=2))


def test_mutation_a_forgotten_start_is_seen(bench, monkeypatch):
    monkeypatch.setattr(Residual, "merge", lambda self, w, p: self.method.merge(w, self._own(p)))
    with pytest.raises(AssertionError):
        check_value(bench)
