"""LaMDA: both starts, what is trained, and the principal part that the spectral one begins with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods import LaMDA

METHODS = [LaMDA(rank=3, alpha=6.0), LaMDA(rank=3, alpha=6.0, start="lora")]


def check_value(bench, method):
    adapter = bench.noisy(method)
    p = bench.numbers(adapter)
    want = bench.w + 2.0 * p["a"] @ p["core"] @ p["b"]
    if method.start == "svd":
        u, s, vt = np.linalg.svd(bench.w, full_matrices=False)
        want -= u[:, :3] @ np.diag(s[:3]) @ vt[:3]
    bench.agree(adapter, want, 5e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.start)
def test_value(bench, method):
    check_value(bench, method)


def test_numbers_that_are_trained(bench):
    shapes = {"core": (3, 3), "b": (3, 8)}
    for method in METHODS:
        trainable = bench.fresh(method).trainable["w"]
        assert {k: v.shape for k, v in trainable.items()} == shapes


def test_the_core_learns_at_once_from_the_spectral_start_only(bench):
    for method, learns in zip(METHODS, (True, False), strict=True):
        adapter = bench.fresh(method)

        def loss(trainable, adapter=adapter):
            return jnp.sum(jl.lift(bench.model)(bench.params, adapter.replace(trainable=trainable),
                                                bench.x) ** 2)  # fmt: skip

        grad = jax.grad(loss)(adapter.trainable)["w"]
        assert (float(jnp.abs(grad["core"]).max()) > 1e-3) == learns
        assert float(jnp.abs(grad["b"]).max()) > 1e-3


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"LaMDA\.rank: got 0, expected an integer of at least 1"):
        LaMDA(rank=0)
    with pytest.raises(ValueError, match=r"LaMDA\.start: got 'x', expected 'svd' or 'lora'"):
        LaMDA(start="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LaMDA\.alpha: got 0\.0, expected > 0"):
        LaMDA(alpha=0.0)
    with pytest.raises(ValueError, match="w: LaMDA rank: got 9, expected at most 8"):
        bench.fresh(LaMDA(rank=9))


def test_mutation_a_core_that_is_not_taken_off_is_seen(bench, monkeypatch):
    good = LaMDA.factors
    monkeypatch.setattr(LaMDA, "factors", lambda self, p: good(self, p | {"b0": 0 * p["b0"]}))
    with pytest.raises(AssertionError):
        check_value(bench, METHODS[0])
