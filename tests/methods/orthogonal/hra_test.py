"""HRA: the chain of reflections one by one, and what reflections keep."""

import numpy as np
import pytest

from jlora.methods.orthogonal.hra import HRA


def chain(u, gram_schmidt):
    out = np.eye(len(u))
    if gram_schmidt:
        q, _ = np.linalg.qr(u)
        return out - 2 * q @ q.T
    for column in u.T:
        unit = column / np.linalg.norm(column)
        out = (np.eye(len(u)) - 2 * np.outer(unit, unit)) @ out
    return out


def check_value(bench, method):
    adapter = bench.noisy(method)
    bench.agree(adapter, chain(bench.numbers(adapter)["u"], method.gram_schmidt) @ bench.w, 5e-5)


@pytest.mark.parametrize("method", [HRA(rank=4), HRA(rank=3, gram_schmidt=True)])
def test_value(bench, method):
    check_value(bench, method)


def test_singular_values_are_kept(bench):
    merged = bench.merged(bench.noisy(HRA(rank=6)))
    assert np.abs(merged - bench.w).max() > 0.1
    np.testing.assert_allclose(merged.T @ merged, bench.w.T @ bench.w, atol=1e-4)


def test_limit_of_zeros_is_no_reflection(bench):
    for method in (HRA(rank=4), HRA(rank=4, gram_schmidt=True)):
        adapter = bench.noisy(method)
        u = adapter.trainable["w"]["u"]
        cut = adapter.replace(trainable={"w": {"u": u.at[:, 2:].set(0)}})
        want = chain(bench.numbers(adapter)["u"][:, :2], method.gram_schmidt) @ bench.w
        np.testing.assert_allclose(bench.merged(cut), want, atol=5e-5)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"HRA\.rank: got 0, expected an integer of at least 1"):
        HRA(rank=0)
    with pytest.raises(ValueError, match="w: HRA rank: got 3, expected an even one"):
        bench.fresh(HRA(rank=3))


def test_mutation_the_chain_in_the_other_order_is_seen(bench, monkeypatch):
    good = HRA.core
    monkeypatch.setattr(HRA, "core", lambda self, u: good(self, u).T)
    with pytest.raises(AssertionError):
        check_value(bench, HRA(rank=4))
