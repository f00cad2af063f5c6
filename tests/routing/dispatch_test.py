"""Dispatch back-ends agree, under the transforms they promise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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


def on_mesh(case, **split):
    """Eight devices with explicit axes: tokens along two of them, outputs along the third."""
    kinds = (AxisType.Explicit,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("rows", "tokens", "outputs"), axis_types=kinds)
    x, a, b, ids, weights = case
    part = np.arange(4).reshape(2, 2)  # of the tokens, twice, as rows
    tokens = P("rows", "tokens", None)
    specs = {"x": tokens, "a": P(), "b": P(None, None, "outputs"), "ids": tokens} | split
    arrays = {"x": x[part], "a": a, "b": b, "ids": ids[part], "weights": weights[part]}
    place = lambda n, t: jax.device_put(t, NamedSharding(mesh, specs.get(n, P())))  # noqa: E731
    return mesh, {n: place(n, t) for n, t in arrays.items()}, arrays


def slopes(backend, p):
    """The output, and the slopes of a function of it by tokens, factors and weights."""

    def loss(q):
        y = dispatch.dispatch(q["x"], q["a"], q["b"], p["ids"], q["weights"], backend)
        return jnp.sum(jnp.tanh(y)), y

    free = {n: t for n, t in p.items() if n != "ids"}
    return jax.grad(loss, has_aux=True)(free)


def check_mesh(case):
    mesh, placed, arrays = on_mesh(case)
    want = slopes("dense", arrays)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p: {k: slopes(k, p) for k in dispatch.BACKENDS})(placed)
    for backend, got in found.items():
        assert got[1].sharding.spec == P("rows", "tokens", "outputs"), backend
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_back_ends_agree_on_an_explicit_mesh_in_value_and_gradient(case):
    check_mesh(case)


def test_mutation_devices_with_the_first_experts_only(case, monkeypatch):
    right = dispatch._gather
    monkeypatch.setattr(dispatch, "_gather", lambda x, a, b, i, w: right(x, a, b, i % 2, w))
    with pytest.raises(AssertionError):
        check_mesh(case)


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"x": P(None, None, "rows")}, r"'gather': x: d_in: got split along \('rows',\)"),
        ({"a": P(None, None, "rows")}, r"'gather': a: got split along \(None, None, 'rows'\)"),
        ({"b": P(None, "rows", None)}, r"'gather': b: experts, r: got split along"),
    ],
)
def test_split_sums_are_refused_on_an_explicit_mesh(case, split, said):
    x, a, b, ids, weights = case
    even = x, jnp.concatenate([a, a[..., :1]], -1), jnp.concatenate([b, b[:, :1]], 1), ids, weights
    mesh, placed, _ = on_mesh(even, **split)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        dispatch.dispatch(**placed, backend="gather")


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
