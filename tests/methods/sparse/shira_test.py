"""SHiRA: its entries, one by one."""

import numpy as np
import pytest

from jlora.methods.sparse import shira
from jlora.methods.sparse.shira import SHiRA


def delta(p):
    out = np.zeros((12, 8))
    for c, i, o in zip(p["c"], p["rows"].astype(int), p["cols"].astype(int), strict=True):
        out[i, o] += c
    return out


def check_value(bench):
    adapter = bench.noisy(SHiRA(rank=2))
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter)))


def test_value(bench):
    check_value(bench)


def check_one_token(bench):
    """For one token the entries are multiplied one by one."""
    adapter, x = bench.noisy(SHiRA(rank=1)), bench.x[:1, :1]
    want = np.asarray(x, np.float64) @ (bench.w + delta(bench.numbers(adapter)))
    np.testing.assert_allclose(bench.forward(adapter, x), want, atol=2e-5)


def test_value_of_one_token(bench):
    check_one_token(bench)


def test_places_are_distinct_as_many_as_loras_numbers_and_of_the_key(bench):
    one, other = (bench.numbers(bench.fresh(SHiRA(rank=3), seed=s)) for s in (0, 1))
    places = set(zip(one["rows"], one["cols"], strict=True))
    assert len(places) == 3 * (12 + 8)
    assert places != set(zip(other["rows"], other["cols"], strict=True))


def test_limit_all_other_entries_are_the_base(bench):
    adapter = bench.noisy(SHiRA(rank=1))
    changed = bench.merged(adapter) != bench.w
    assert changed.sum() == 20
    assert np.linalg.matrix_rank(delta(bench.numbers(adapter)), tol=1e-6) > 1


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"SHiRA\.rank: got 0, expected an integer of at least 1"):
        SHiRA(rank=0)
    with pytest.raises(ValueError, match="w: SHiRA rank: got 5, which is 100 entries"):
        bench.fresh(SHiRA(rank=5))


def test_mutation_a_row_too_far_is_seen(bench, monkeypatch):
    good = shira.sparse_product
    monkeypatch.setattr(
        shira, "sparse_product", lambda x, c, rows, cols, d: good(x, c, (rows + 1) % 12, cols, d)
    )
    with pytest.raises(AssertionError):
        check_one_token(bench)


def test_mutation_an_entry_written_too_far_is_seen(bench, monkeypatch):
    good = shira.scattered
    monkeypatch.setattr(
        shira, "scattered", lambda w, c, rows, cols: good(w, c, (rows + 1) % 12, cols)
    )
    with pytest.raises(AssertionError):
        check_value(bench)
