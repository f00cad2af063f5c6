"""LoHa against the Hadamard product multiplied out."""

import jax
import numpy as np
import pytest

from jlora import algebra
from jlora.methods.low_rank.loha import LoHa


def check_value(bench):
    adapter = bench.noisy(LoHa(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    assert p["scale"] == 2.0
    bench.agree(adapter, bench.w + 2.0 * (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"]))


def test_value(bench):
    check_value(bench)


def test_the_rank_exceeds_the_parameters(bench):
    adapter = bench.noisy(LoHa(rank=2))
    delta = bench.merged(adapter) - bench.w
    assert np.linalg.matrix_rank(delta, tol=1e-5) == 4
    s = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(algebra.singular_values(adapter)["w"], s[:4], rtol=1e-4)


def test_limit_rank_one_factors_of_ones_are_lora(bench):
    adapter = bench.noisy(LoHa(rank=1, alpha=1.0))
    one = {k: v * 0 + 1 if k in ("a2", "b2") else v for k, v in adapter.trainable["w"].items()}
    p = bench.numbers(adapter)
    bench.agree(adapter.replace(trainable={"w": one}), bench.w + p["a1"] @ p["b1"])


def test_no_dense_delta_is_formed(bench):
    adapter = bench.noisy(LoHa(rank=2))
    text = str(jax.make_jaxpr(bench.forward)(adapter))
    made = [line for line in text.splitlines() if "dot_general" in line]
    assert made and not any(":f32[12,8]" in line for line in made)


def test_refusals():
    with pytest.raises(ValueError, match=r"LoHa\.rank: got 0, expected an integer of at least 1"):
        LoHa(rank=0)


def test_mutation_a_lost_column_is_seen(bench, monkeypatch):
    good = LoHa.factors
    monkeypatch.setattr(LoHa, "factors", lambda self, p: (good(self, p)[0], good(self, p)[1] * 0))
    with pytest.raises(AssertionError):
        check_value(bench)
