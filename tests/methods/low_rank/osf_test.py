"""OSF: the small directions are trained, and the large ones do not feel it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank import osf
from jlora.methods.low_rank.osf import OSF, kept_of


def check_value(bench):
    adapter = bench.noisy(OSF(kept=5))
    p, (u, s, vt) = bench.numbers(adapter), np.linalg.svd(bench.w, full_matrices=False)
    high = u[:, :5] @ np.diag(s[:5]) @ vt[:5]
    bench.agree(adapter, high + p["u"] @ np.diag(p["s"]) @ p["v"], 1e-4)


def test_value(bench):
    check_value(bench)


def test_a_fresh_adapter_is_exactly_the_identity(bench):
    fresh = bench.fresh(OSF())
    np.testing.assert_array_equal(bench.forward(fresh), jax.jit(bench.model)(bench.params, bench.x))
    assert {k: v.shape for k, v in fresh.trainable["w"].items()} == {
        "u": (12, 4),
        "s": (4,),
        "v": (4, 8),
    }


def leaks(bench, adapter):
    """How much of a step of gradient descent lies in the large directions, of u and of v."""
    target = jnp.asarray(np.random.default_rng(5).normal(size=(3, 5, 8)), jnp.float32)

    def loss(trainable):
        y = jl.lift(bench.model)(bench.params, adapter.replace(trainable=trainable), bench.x)
        return jnp.mean((y - target) ** 2)

    g = jax.grad(loss)(adapter.trainable)["w"]
    u, _, vt = np.linalg.svd(bench.w, full_matrices=False)
    assert min(np.abs(g["u"]).max(), np.abs(g["v"]).max()) > 0.01
    return np.abs(u[:, :4].T @ g["u"]).max(), np.abs(g["v"] @ vt[:4].T).max()


def test_gradients_are_orthogonal_to_what_is_kept(bench):
    assert max(leaks(bench, bench.noisy(OSF()))) < 1e-5


def test_mutation_a_gradient_that_is_not_projected_is_seen(bench, monkeypatch):
    monkeypatch.setattr(osf, "across", lambda u, high: u)
    assert min(leaks(bench, bench.noisy(OSF()))) > 1e-3


def test_how_many_are_kept():
    assert [kept_of(k, 9) for k in (None, 3, 20, 0.75, 0.05)] == [4, 3, 9, 6, 0]


def test_refusals(bench):
    for kept in (0, 1.5, 0.0):
        with pytest.raises(ValueError, match=rf"OSF\.kept: got {kept}, expected a number of dire"):
            OSF(kept=kept)
    with pytest.raises(ValueError, match="w: OSF kept: got 8 of 8 directions, expected 1 to 7"):
        bench.fresh(OSF(kept=9))


def test_mutation_the_values_left_out_are_seen(bench, monkeypatch):
    good = OSF.factors
    monkeypatch.setattr(
        OSF, "factors", lambda self, p: good(self, {**p, "s": jnp.ones_like(p["s"])})
    )
    with pytest.raises(AssertionError):
        check_value(bench)
