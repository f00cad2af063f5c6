"""DeLoRA: the sum of unit directions, and the bound that holds for any factors."""

import numpy as np
import pytest

from jlora.methods.decomposed.delora import DeLoRA


def check_value(bench):
    adapter = bench.noisy(DeLoRA(rank=3, strength=6.0))
    p, total = bench.numbers(adapter), np.zeros((12, 8))
    for a, b in zip(p["a"].T, p["b"], strict=True):
        total += np.outer(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    norm = np.linalg.norm(bench.w, axis=1)
    bench.agree(adapter, bench.w + p["strength"] / 3 * norm[:, None] * total, 5e-5)


def test_value(bench):
    check_value(bench)


def test_the_bound_holds_for_factors_of_any_size(bench):
    adapter = bench.noisy(DeLoRA(rank=3, strength=2.0), size=100.0)
    own = adapter.trainable["w"]
    adapter = adapter.replace(trainable={"w": own | {"strength": 0 * own["strength"] + 2}})
    change = (bench.merged(adapter) - bench.w) / np.linalg.norm(bench.w, axis=1)[:, None]
    assert 0.5 < np.linalg.norm(change) <= 2.0 + 1e-4


def test_limit_no_strength_is_the_base(bench):
    adapter = bench.noisy(DeLoRA(rank=3))
    own = adapter.trainable["w"]
    bench.agree(adapter.replace(trainable={"w": own | {"strength": 0 * own["strength"]}}), bench.w)


def test_refusals():
    with pytest.raises(ValueError, match=r"DeLoRA\.rank: got 0, expected an integer of at least 1"):
        DeLoRA(rank=0)


def test_mutation_the_norms_of_outputs_are_seen(bench, monkeypatch):
    good = DeLoRA.factors

    def unscaled(self, p):
        return good(self, p | {"norm": 0 * p["norm"] + p["norm"].mean()})

    monkeypatch.setattr(DeLoRA, "factors", unscaled)
    with pytest.raises(AssertionError):
        check_value(bench)
