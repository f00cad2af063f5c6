"""PiSSA: the principal part is what is trained, the residual what is kept."""

import jax
import numpy as np
import pytest

from jlora.methods.low_rank import pissa
from jlora.methods.low_rank.pissa import PiSSA


def check_value(bench):
    adapter = bench.noisy(PiSSA(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    bench.agree(adapter, bench.w - 2 * p["a0"] @ p["b0"] + 2 * p["a"] @ p["b"])


def test_value(bench):
    check_value(bench)


def test_frozen_leaves_are_the_principal_part(bench):
    adapter = bench.fresh(PiSSA(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    u, s, vt = np.linalg.svd(bench.w)
    np.testing.assert_allclose(2 * p["a0"] @ p["b0"], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(p["a0"].T @ p["a0"], np.diag(s[:3] / 2), atol=1e-5)  # balanced
    assert np.array_equal(p["a"], p["a0"]) and np.array_equal(p["b"], p["b0"])
    np.testing.assert_array_equal(bench.merged(adapter), bench.w)


def test_limit_full_rank_leaves_no_residual(bench):
    adapter = bench.fresh(PiSSA(rank=8))
    zero = jax.tree.map(lambda t: t * 0, adapter.trainable)
    np.testing.assert_allclose(bench.merged(adapter.replace(trainable=zero)), 0, atol=1e-5)


def test_the_randomised_svd_finds_the_same_part(bench):
    p = bench.numbers(bench.fresh(PiSSA(rank=3, niter=8)))
    u, s, vt = np.linalg.svd(bench.w)
    np.testing.assert_allclose(
        3 / 3 * p["scale"] * p["a"] @ p["b"], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-3
    )
    rng = np.random.default_rng(4)
    tall = np.asarray(rng.normal(size=(60, 4)) @ rng.normal(size=(4, 50)), np.float32)
    u, s, vt = pissa.randomized_svd(jax.random.key(0), tall, 4, 2)  # 14 columns of 50
    np.testing.assert_allclose((u * s[None]) @ vt, tall, atol=1e-4)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"w: PiSSA rank expected in 1\.\.8, got 9"):
        bench.fresh(PiSSA(rank=9))


def test_mutation_a_forgotten_residual_is_seen(bench, monkeypatch):
    def forgets(self, w, p):
        return w + p["scale"] * (p["a"] @ p["b"])

    monkeypatch.setattr(PiSSA, "merge", forgets)
    with pytest.raises(AssertionError):
        check_value(bench)
