"""Super-Tuning: the largest entries, with and without LoRA next to them."""

import numpy as np
import pytest

from jlora.methods.sparse.supertuning import SuperTuning


def check_value(bench, method):
    adapter = bench.noisy(method)
    p, out = bench.numbers(adapter), bench.w.copy()
    for c, i, o in zip(p["c"], p["rows"].astype(int), p["cols"].astype(int), strict=True):
        out[i, o] += c
    if method.rank:
        out += method.alpha / method.rank * p["a"] @ p["b"]
    bench.agree(adapter, out)


@pytest.mark.parametrize("rank", [0, 2])
def test_value(bench, rank):
    check_value(bench, SuperTuning(sparsity=0.8, rank=rank, alpha=3.0))


@pytest.mark.parametrize("largest", [True, False])
def test_places_are_the_largest_or_smallest(bench, largest):
    p = bench.numbers(bench.fresh(SuperTuning(sparsity=0.9, largest=largest)))
    size = np.abs(bench.w)
    limit = np.sort(size.reshape(-1))[-9 if largest else 8]
    want = size >= limit if largest else size <= limit
    got = np.zeros((12, 8), bool)
    got[p["rows"].astype(int), p["cols"].astype(int)] = True
    np.testing.assert_array_equal(got, want)


def test_limit_no_sparsity_is_any_delta(bench):
    adapter = bench.noisy(SuperTuning(sparsity=0.0))
    assert adapter.trainable["w"]["c"].size == 96
    assert (bench.merged(adapter) != bench.w).all()


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"SuperTuning\.sparsity: got 1, expected 0 <= it < 1"):
        SuperTuning(sparsity=1)
    with pytest.raises(ValueError, match=r"w: SuperTuning sparsity: got 0\.999, which leaves"):
        bench.fresh(SuperTuning(sparsity=0.999))


def test_mutation_lora_without_its_scale_is_seen(bench, monkeypatch):
    good = SuperTuning.merge
    monkeypatch.setattr(
        SuperTuning, "merge", lambda self, w, p: good(self, w, p | {"scale": 0 * p["scale"] + 1})
    )
    with pytest.raises(AssertionError):
        check_value(bench, SuperTuning(sparsity=0.8, rank=2, alpha=3.0))
