"""KaSA: the weight without its smallest directions, and the delta in the form of an SVD."""

import numpy as np
import pytest

from jlora.methods.low_rank.kasa import KaSA


def cut(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    s[len(s) - rank :] = 0
    return u @ np.diag(s) @ vt


def check_value(bench):
    adapter = bench.noisy(KaSA(rank=2, alpha=3.0))
    p = bench.numbers(adapter)
    bench.agree(adapter, cut(bench.w, 2) + 1.5 * p["a"] @ np.diag(p["d"]) @ p["b"], 5e-5)


def test_value(bench):
    check_value(bench)


def test_limit_a_fresh_adapter_is_the_cut_weight(bench):
    adapter = bench.fresh(KaSA(rank=3))
    bench.agree(adapter, cut(bench.w, 3))
    assert np.linalg.matrix_rank(bench.merged(adapter), tol=1e-4) == 5


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"KaSA\.rank: got 0, expected an integer of at least 1"):
        KaSA(rank=0)
    with pytest.raises(ValueError, match="w: KaSA rank: got 8, expected less than 8"):
        bench.fresh(KaSA(rank=8))


def test_mutation_the_whole_weight_kept_is_seen(bench, monkeypatch):
    good = KaSA.factors
    monkeypatch.setattr(KaSA, "factors", lambda self, p: good(self, p | {"a0": 0 * p["a0"]}))
    with pytest.raises(AssertionError):
        check_value(bench)
