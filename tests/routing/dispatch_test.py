"""Dispatch back-ends agree, under the transforms they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import dispatch


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    f32 = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    ids = jnp.asarray(np.stack([rng.permutation(5)[:2] for _ in range(7)]), jnp.int32)
    return f32(7, 6), f32(5, 6, 3), f32(5, 3, 4), ids, jnp.abs(f32(7, 2))


def check(case, backend):
    x, a, b, ids, weights = (np.asarray(t) for t in case)
    want = np.zeros((7, 4))
    for t in range(7):
        for e, w in zip(ids[t], weights[t], strict=True):
            want[t] += w * x[t].astype(np.float64) @ a[e] @ b[e]
    np.testing.assert_allclose(dispatch.dispatch(*case, backend), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_value(case, backend):
    check(case, backend)


def test_an_idle_expert_gets_no_gradient(case):
    x, a, b, ids, weights = case
    ids = jnp.where(ids == 4, 0, ids)
    for backend in dispatch.BACKENDS:
        loss = lambda a, k=backend: jnp.sum(dispatch.dispatch(x, a, b, ids, weights, k))  # noqa: E731
        grad = jax.grad(loss)(a)
        assert not np.any(grad[4]) and np.any(grad[0])


def test_a_bank_of_experts_under_vmap(case):
    bank = jax.tree.map(lambda t: jnp.stack([t, t]), case)
    for backend in dispatch.BACKENDS:
        got = jax.vmap(lambda *c, k=backend: dispatch.dispatch(*c, k))(*bank)
        np.testing.assert_allclose(got[1], dispatch.dispatch(*case, backend), rtol=1e-5, atol=1e-5)


def test_refusals(case):
    with pytest.raises(ValueError, match="backend: expected one of"):
        dispatch.dispatch(*case, "sparse")


def test_mutation_an_unsorted_dispatch_is_seen(case, monkeypatch):
    monkeypatch.setattr(dispatch.jnp, "argsort", lambda t, stable: jnp.arange(t.size))
    with pytest.raises(AssertionError):
        check(case, "ragged")


def test_all_experts_with_weights(case):
    x, a, b, _, _ = (np.asarray(t, np.float64) for t in case)
    gates = np.random.default_rng(1).random((7, 5)).astype(np.float32)
    want = np.einsum("ti,eir,ero,te->to", x, a, b, gates)
    got = dispatch.mixed(*case[:3], jnp.asarray(gates))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
