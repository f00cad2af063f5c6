"""HiRA: the entrywise product, and the rank it reaches."""

import numpy as np
import pytest

from jlora.methods.low_rank.hira import HiRA


def check_value(bench):
    adapter = bench.noisy(HiRA(rank=2))
    p = bench.numbers(adapter)
    bench.agree(adapter, bench.w * (1 + p["a"] @ p["b"]))


def test_value(bench):
    check_value(bench)


def test_a_change_of_rank_one_factors_has_full_rank(bench):
    delta = bench.merged(bench.noisy(HiRA(rank=1))) - bench.w
    assert np.linalg.matrix_rank(delta, tol=1e-4) == 8


def test_limit_where_the_weight_is_zero_it_stays_zero(bench):
    adapter = bench.noisy(HiRA(rank=2))
    p = {**adapter.trainable["w"], **adapter.frozen["w"]}
    assert not np.any(HiRA(rank=2).merge(bench.params["w"] * 0, p))


def test_refusals():
    with pytest.raises(ValueError, match=r"HiRA\.rank: got 0, expected an integer of at least 1"):
        HiRA(rank=0)


def test_mutation_an_additive_delta_is_seen(bench, monkeypatch):
    monkeypatch.setattr(HiRA, "merge", lambda self, w, p: w + p["a"] @ p["b"])
    with pytest.raises(AssertionError):
        check_value(bench)
