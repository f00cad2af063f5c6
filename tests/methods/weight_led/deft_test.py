"""DEFT: what is taken out and what is put in, by both projections."""

import numpy as np
import pytest

from jlora.methods.weight_led.deft import DEFT


def check_value(bench, projection="relu"):
    adapter = bench.noisy(DEFT(rank=2, alpha=3.0, projection=projection))
    p = bench.numbers(adapter)
    if projection == "relu":
        n, q = np.maximum(p["p"], 0), p["p"]
    else:
        n = q = np.linalg.qr(p["p"])[0]
    want = bench.w @ (np.eye(8) - n @ q.T) + 1.5 * p["r"] @ q.T
    bench.agree(adapter, want, 5e-5)


@pytest.mark.parametrize("projection", ["relu", "qr"])
def test_value(bench, projection):
    check_value(bench, projection)


def test_limit_removal_leaves_nothing_in_the_subspace(bench):
    adapter = bench.noisy(DEFT(rank=3, projection="qr", remove=True))
    merged, p = bench.merged(adapter), bench.numbers(adapter)["p"]
    np.testing.assert_allclose(merged @ p, 0, atol=1e-5)
    q = np.linalg.qr(p)[0]
    bench.agree(adapter, bench.w - bench.w @ q @ q.T)
    assert np.linalg.matrix_rank(merged, tol=1e-4) == 5


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"DEFT\.projection: got 'svd', expected 'relu' or 'qr'"):
        DEFT(projection="svd")
    with pytest.raises(ValueError, match="w: DEFT rank: got 9, expected at most d_out = 8"):
        bench.fresh(DEFT(rank=9))


def test_mutation_nothing_taken_out_is_seen(bench, monkeypatch):
    good = DEFT.sides
    monkeypatch.setattr(DEFT, "sides", lambda self, p: (0 * p, good(self, p)[1]))
    with pytest.raises(AssertionError):
        check_value(bench)
