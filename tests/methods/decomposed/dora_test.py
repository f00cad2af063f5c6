"""DoRA: closed-form norms, the magnitude vector, the detached gradient, no dense V."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.decomposed import dora
from jlora.methods.decomposed.dora import DoRA


def check_value(bench):
    adapter = bench.noisy(DoRA(rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    v = bench.w + 2 * p["a"] @ p["b"]
    bench.agree(adapter, v * p["m"] / np.linalg.norm(v, axis=0))


def test_value(bench):
    check_value(bench)


def test_columns_have_length_m(bench):
    adapter = bench.noisy(DoRA(rank=3))
    lengths = np.linalg.norm(bench.merged(adapter), axis=0)
    np.testing.assert_allclose(lengths, np.abs(bench.numbers(adapter)["m"]), rtol=1e-5)


def test_gradients_take_the_norm_as_a_constant(bench):
    adapter = bench.noisy(DoRA(rank=2))
    p = bench.numbers(adapter)
    dy = np.random.default_rng(3).normal(size=(3, 5, 8))

    def loss(trainable):
        y = bench.forward(adapter.replace(trainable=trainable))
        return jnp.sum(y * jnp.asarray(dy, y.dtype))

    got = jax.grad(loss)(adapter.trainable)["w"]
    x, g = np.asarray(bench.x, np.float64).reshape(15, 12), dy.reshape(15, 8)
    s = p["scale"]
    norm = np.linalg.norm(bench.w + s * p["a"] @ p["b"], axis=0)
    dv = (x.T @ g) * p["m"] / norm  # W' = V m / const
    np.testing.assert_allclose(got["a"], s * dv @ p["b"].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got["b"], s * p["a"].T @ dv, rtol=1e-3, atol=1e-4)
    v = bench.w + s * p["a"] @ p["b"]
    np.testing.assert_allclose(got["m"], np.sum((x @ v) * g, 0) / norm, rtol=1e-3, atol=1e-4)


def test_the_step_forms_no_dense_weight(bench):
    adapter = bench.noisy(DoRA(rank=2))

    def loss(trainable):
        return jnp.sum(bench.forward(adapter.replace(trainable=trainable)) ** 2)

    lines = str(jax.make_jaxpr(jax.grad(loss))(adapter.trainable)).splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert products and not any(":f32[12,8]" in line for line in products)


def test_limit_a_column_of_zeros_stays_zero_and_finite(bench):
    params = {"w": bench.params["w"].at[:, 2].set(0)}
    site = jl.sites(bench.model, params, bench.x)
    adapter = jl.init(jax.random.key(0), bench.model, params, bench.x, methods={"w": DoRA(rank=2)})
    y = jl.lift(bench.model)(params, adapter, bench.x)
    assert len(site) == 1 and not np.any(y[..., 2]) and np.all(np.isfinite(y))


def test_norms_in_bfloat16_bases_are_float32(bench):
    w = bench.params["w"].astype(jnp.bfloat16)
    a, b = jnp.ones((12, 2)) * 0.1, jnp.ones((2, 8)) * 0.2
    got = dora.column_norms(w, a, b, jnp.asarray(0.5))
    want = np.linalg.norm(np.asarray(w, np.float64) + 0.5 * np.asarray(a @ b, np.float64), axis=0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def cancelled(left, d_in=36, d_out=20, rank=4):
    """(w, a, b) in float32 of which a share `left` of four columns stays, and their true norms."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(d_in, rank)), rng.normal(size=(rank, d_out))
    w = rng.normal(size=(d_in, d_out))
    w[:, :4] = left * w[:, :4] - 0.5 * (a @ b)[:, :4]
    w, a, b = (np.asarray(t, np.float32) for t in (w, a, b))
    true = np.linalg.norm(w.astype(float) + 0.5 * a.astype(float) @ b.astype(float), axis=0)
    return (*map(jnp.asarray, (w, a, b)), true)


@pytest.mark.parametrize("left", [0.3, 1e-2, 1e-3, 1e-4])
def test_norms_of_columns_that_nearly_cancel(left):
    """To 1e-6 of themselves, or where less is left to the rounding of W + s A B, as rows too."""
    w, a, b, true = cancelled(left)
    tol = 1e-6 + 1e-7 / left
    got = dora.column_norms(w, a, b, jnp.asarray(0.5))
    np.testing.assert_allclose(got, true, rtol=tol)
    np.testing.assert_allclose(got[4:], true[4:], rtol=1e-6)
    np.testing.assert_allclose(dora.row_norms(w.T, 0.5 * b.T, a.T), true, rtol=tol)


def test_norms_where_the_columns_of_a_cancel():
    """A B is small, A and B are not: two halves that take each other away."""
    rng = np.random.default_rng(8)
    a, b, w = (rng.normal(size=s) for s in ((36, 4), (4, 20), (36, 20)))
    a, b = np.concatenate([a, a], 1), 1e3 * np.concatenate([b, -b * (1 - 1e-6)])
    w, a, b = (np.asarray(t, np.float32) for t in (w, a, b))
    true = np.linalg.norm(w.astype(float) + a.astype(float) @ b.astype(float), axis=0)
    got = dora.column_norms(*map(jnp.asarray, (w, a, b)), jnp.ones(()))
    np.testing.assert_allclose(got, true, rtol=1e-4)


def test_lifted_columns_that_nearly_cancel_are_those_merged():
    """One of two adapters of a bank; the other computes as ever."""
    w, a, b, _ = cancelled(1e-3)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(5, 36)), jnp.float32)
    model = lambda p, x: x @ p["w"]  # noqa: E731
    fresh = jl.init(jax.random.key(0), model, {"w": w}, x, methods={"w": DoRA(4, alpha=2.0)})
    m = fresh.trainable["w"]["m"]
    pair = [fresh.replace(trainable={"w": {"a": a, "b": c, "m": m}}) for c in (b, 0.1 * b)]
    got = jax.vmap(jl.lift(model), (None, 0, None))({"w": w}, jl.stack(pair), x)
    w64, a64, b64, m64, x64 = (np.asarray(t, np.float64) for t in (w, a, b, m, x))
    for y, c, tol in zip(got, (b64, 0.1 * b64), (1e-3, 2e-6), strict=True):
        v = w64 + 0.5 * a64 @ c
        want = x64 @ (v * m64 / np.linalg.norm(v, axis=0))
        np.testing.assert_allclose(y, want, rtol=0, atol=tol * np.abs(want).max())


def test_mutation_without_the_recomputation_the_digits_are_lost(monkeypatch):
    monkeypatch.setattr(dora, "LOST", 0.0)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_norms_of_columns_that_nearly_cancel(1e-3)
    jax.clear_caches()


def test_refusals():
    with pytest.raises(ValueError, match=r"DoRA\.rank: got 0, expected an integer of at least 1"):
        DoRA(rank=0)


def test_mutation_a_missing_cross_term_is_seen(bench, monkeypatch):
    def wrong(w, a, b, scale):
        d = scale * (a @ b)
        return jnp.sqrt(jnp.sum(w * w, axis=0) + jnp.sum(d * d, axis=0))

    monkeypatch.setattr(dora, "column_norms", wrong)
    with pytest.raises(AssertionError):
        check_value(bench)


def test_the_loop_takes_the_weight_in_the_shape_that_the_matmul_has():
    """In another shape XLA keeps a second copy of every layer's weight, though no step is taken."""
    w, a, b = jnp.ones((64, 6)), jnp.ones((64, 2)), jnp.ones((2, 6))
    for norms in (
        lambda: dora.column_norms(w, a, b, jnp.float32(1)),
        lambda: dora.row_norms(w, a, b),
    ):
        (call,) = [e for e in jax.make_jaxpr(norms)().eqns if "jaxpr" in e.params]
        (loop,) = [e for e in call.params["jaxpr"].eqns if e.primitive.name == "while"]
        shapes = [v.aval.shape for v in loop.invars]
        assert w.shape in shapes and max(map(len, shapes)) == 2
