"""FRoD: the diagonal and a few entries in the weight's own basis."""

import jax
import numpy as np
import pytest

from jlora.methods.shared_basis.frod import FRoD, coordinates, places
from jlora.torch_random import Generator


def check_value(bench):
    adapter = bench.noisy(FRoD(rate=0.1))
    p = bench.numbers(adapter)
    inner = np.diag(p["lam"])
    for c, i, o in zip(p["c"], p["rows"].astype(int), p["cols"].astype(int), strict=True):
        inner[i, o] += c
    assert p["c"].size == 14
    bench.agree(adapter, p["v"] @ inner @ p["u"], 1e-4)


def test_value(bench):
    check_value(bench)


def test_the_basis_makes_the_weight_diagonal(bench):
    p = bench.numbers(bench.fresh(FRoD()))
    np.testing.assert_allclose(p["v"] @ np.diag(p["lam0"]) @ p["u"], bench.w, atol=1e-5)
    np.testing.assert_allclose(p["v"].T @ p["v"], np.eye(12), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(p["u"], axis=1), [1.0] * 8 + [0.0] * 4, atol=1e-5)


def test_a_fresh_adapter_is_exactly_the_identity(bench):
    got = bench.forward(bench.fresh(FRoD()))
    np.testing.assert_array_equal(got, jax.jit(bench.model)(bench.params, bench.x))


def test_places_are_drawn_of_those_off_the_diagonal():
    off = [(o, i) for o in range(5) for i in range(5) if o != i]
    want = [off[k] for k in Generator(3).permutation(20, 5)]
    rows, cols = places(5, 0.2, 3)
    assert list(zip(cols.tolist(), rows.tolist(), strict=True)) == want
    assert [places(n, rate, 0)[0].size for n, rate in [(1, 1.0), (3, 1.0), (9, 1e-6), (9, 0)]] == [
        0,
        6,
        1,
        0,
    ]


def test_coordinates_of_a_basis_that_is_not_orthonormal():
    rng = np.random.default_rng(0)
    v, w = (rng.normal(size=shape).astype("f4") for shape in ((6, 6), (6, 4)))
    lam0, u = coordinates(v, w)
    np.testing.assert_allclose(v @ (lam0[:, None] * u), w, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"FRoD\.rate: got 1\.5, expected 0 <= it <= 1"):
        FRoD(rate=1.5)
    with pytest.raises(ValueError, match=r"FRoD: the basis loses 1\.0 of a weight, expected one"):
        coordinates(np.diag([1.0, 0.0]), np.eye(2))


def test_mutation_entries_transposed_are_seen(bench, monkeypatch):
    good = FRoD.merge
    swap = lambda p: {**p, "rows": p["cols"], "cols": p["rows"]}  # noqa: E731
    monkeypatch.setattr(FRoD, "merge", lambda self, w, p: good(self, w, swap(p)))
    with pytest.raises(AssertionError):
        check_value(bench)
