"""Limits of attention's gradient: the chain is autodiff, features are Taylor's, time is linear."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.analysis import attention_limits as lib

N, D_IN, D, SCALE, BETA = 12, 7, 4, 1.5, 0.5
DRAW = np.random.default_rng(0)
f32 = lambda *shape: DRAW.normal(size=shape).astype(np.float32)  # noqa: E731
X, Y, WQ, WK, WV = f32(N, D_IN), f32(N, D), f32(D_IN, D), f32(D_IN, D), f32(D_IN, D)
A, B = f32(D_IN, 2), f32(2, D)
Q, K, V = X @ (WQ + SCALE * A @ B), X @ WK, X @ WV


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def grads():
    """By jax.grad of a lifted attention: of A and B."""

    def attention(p, x):
        q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
        return jax.nn.softmax(BETA * q @ k.T, axis=-1) @ v

    params = {"q": jnp.asarray(WQ), "k": jnp.asarray(WK), "v": jnp.asarray(WV)}
    method = jl.LoRA(2, alpha=2 * SCALE)
    adapter = jl.init(jax.random.key(0), attention, params, jnp.asarray(X), methods={"q": method})
    tuned = jl.lift(attention)

    def loss(trainable):
        out = tuned(params, adapter.replace(trainable=trainable), jnp.asarray(X))
        return 0.5 * jnp.sum((out - Y) ** 2)

    found = jax.jit(jax.grad(loss))({"q": {"a": jnp.asarray(A), "b": jnp.asarray(B)}})
    return found["q"]["a"], found["q"]["b"]


def test_the_chain_is_the_gradient(grads):
    c = softmax(BETA * Q @ K.T) @ V - Y
    by_q = lib.query_gradient(Q, K, V, c, BETA)
    for found, want in zip(lib.factor_gradients(X, by_q, A, B, SCALE), grads, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    f = softmax(BETA * Q @ K.T)
    half = BETA * (f * (c @ V.T)) @ K
    wrong, _ = lib.factor_gradients(X, jnp.asarray(half), A, B, SCALE)
    assert np.abs(wrong - grads[0]).max() > 0.1, "mutation: p without its second term"


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_features_have_taylors_inner_products(degree):
    found = np.asarray(lib.features(jnp.asarray(X), degree))
    assert found.shape == (N, lib.feature_count(D_IN, degree))
    inner = X.astype("f8") @ X.T.astype("f8")
    want = sum(inner**g / math.factorial(g) for g in range(degree + 1))
    np.testing.assert_allclose(found @ found.T, want, rtol=1e-4, atol=1e-3)
    words = set(itertools.product(range(2), repeat=degree))
    assert lib.feature_count(1, degree) <= len(words) + degree


def test_small_entries_are_exact_and_large_ones_break_it():
    error = {}
    for size in (0.1, 0.5, 1.0, 3.0):
        q, k = (jnp.asarray(size * t / np.abs(t).max()) for t in (Q, K))
        f = softmax(np.asarray(q, "f8") @ np.asarray(k, "f8").T)
        c = f @ V
        found = lib.approximate(q, k, V)
        want = lib.query_gradient(q, k, V, jnp.asarray(c, jnp.float32))
        error[size] = float(jnp.linalg.norm(found.queries - want) / jnp.linalg.norm(want))
        gap = float(np.linalg.norm(found.output - c) / np.linalg.norm(c))
        assert gap < error[size] or gap < 1e-5
    assert error[0.1] < 1e-5 < error[0.5] < error[1.0] < error[3.0] and error[3.0] > 0.2, error


def test_a_higher_degree_and_any_gradient_come_closer():
    q, k = 0.1 * Q, 0.2 * K
    want = lib.query_gradient(q, k, V, Y, BETA)
    gap = [
        float(jnp.abs(lib.approximate(q, k, V, Y, BETA, m).queries - want).max()) for m in (2, 4, 6)
    ]
    assert gap[0] > 3 * gap[1] > 9 * gap[2]
    assert gap[2] < 0.02 * float(jnp.abs(want).max())


def test_no_array_holds_all_pairs():
    n, m = 101, 103
    shape = jax.ShapeDtypeStruct

    def sizes(fn):
        rows = shape((n, D), "float32"), *[shape((m, D), "float32")] * 2, shape((n, D), "float32")
        jaxpr = jax.make_jaxpr(fn)(*rows)
        return {v.aval.shape for e in jaxpr.jaxpr.eqns for v in e.outvars}

    both = lambda found: [s for s in found if n in s and m in s]  # noqa: E731
    assert not both(sizes(lambda *t: lib.approximate(*t)))
    assert both(sizes(lambda *t: lib.query_gradient(*t))), "mutation: the exact chain has them"


def test_bounds_are_the_largest_entries():
    found = lib.bounds(X, X, WQ, WK, A, B, SCALE)
    want = [np.abs(t).max() for t in (Q, K, SCALE * X @ A @ B)] + [math.sqrt(math.log(N))]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert np.linalg.norm(Q, 2) > 1.5 * found.queries, "entries, not the operator norm"


@pytest.mark.parametrize("degree", [-1, 9])
def test_what_cannot_work_is_an_error(degree):
    with pytest.raises(ValueError, match=f"degree: got {degree}"):
        lib.features(jnp.zeros((2, 32)), degree)
