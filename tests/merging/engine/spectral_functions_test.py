"""Spectral functions: values, and derivatives where an SVD's own are infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.merging.engine import spectral_functions as sp

RNG = np.random.default_rng(0)


def matrix(s, p=5, q=4, seed=0):
    """A matrix [p, q] of given singular values."""
    rng = np.random.default_rng(seed)
    x, y = (np.linalg.qr(rng.normal(size=(d, len(s))))[0] for d in (p, q))
    return x @ np.diag(s) @ y.T


def cut(s):
    return s * (jnp.arange(s.shape[0]) < 2).astype(s.dtype)


def flat(s):
    return jnp.broadcast_to(jnp.mean(s), s.shape)


def square(s):
    return s**2


def cube(s):
    return s**3


def double(f, c):
    """f of c in float64 by numpy."""
    x, s, y = np.linalg.svd(c, full_matrices=False)
    return x @ np.diag(np.asarray(f(jnp.asarray(s, jnp.float32)), np.float64)) @ y


CASES = {
    "distinct": (square, [3.0, 2.0, 1.0, 0.5]),
    "repeated": (square, [2.0, 2.0, 1.0, 1.0]),
    "zeros, smooth": (cube, [2.0, 1.0, 0.0, 0.0]),
    "cut between distinct": (cut, [3.0, 3.0, 1.0, 1.0]),
    "mean": (flat, [3.0, 2.0, 2.0, 1.0]),
    "polar": (jnp.ones_like, [3.0, 2.0, 2.0, 1.0]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wide", [False, True])
def test_derivative_is_that_of_differences(name, wide):
    f, s = CASES[name]
    c, dc = matrix(s), np.random.default_rng(1).normal(size=(5, 4))
    c, dc = (c.T, dc.T) if wide else (c, dc)
    f32 = [jnp.asarray(t, jnp.float32) for t in (c, dc)]
    value, got = jax.jvp(lambda t: sp.spectral(f, t), f32[:1], f32[1:])
    np.testing.assert_allclose(value, double(f, c), atol=1e-5)
    h = 2e-3
    want = (double(f, c + h * dc) - double(f, c - h * dc)) / (2 * h)
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_mutation_the_derivative_of_svd_itself_is_not_finite():
    """Why this exists: JAX's own derivative of the same function."""

    def naive(c):
        x, s, y = jnp.linalg.svd(c, full_matrices=False)
        return jnp.sum(jnp.cos((x * (s**2)[None]) @ y))

    def safe(c):
        return jnp.sum(jnp.cos(sp.spectral(square, c)))

    c = jnp.eye(4)
    assert not np.isfinite(jax.grad(naive)(c)).all()
    assert np.isfinite(jax.grad(safe)(c)).all()


def test_top_basis_spans_and_its_product_is_differentiated():
    c, dc = (np.float32(t) for t in (matrix([3, 2, 1, 0.5]), RNG.normal(size=(5, 4))))

    def kept(c):
        y, _ = sp.top_basis(3, False, c, 2)
        return sp.dot("pq,kq,kr->pr", c, y, y)

    value, got = jax.jvp(kept, (jnp.asarray(c),), (jnp.asarray(dc),))
    np.testing.assert_allclose(value, double(cut, c), atol=1e-5)
    h = 2e-3
    want = (double(cut, c + h * dc) - double(cut, c - h * dc)) / (2 * h)
    np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max())


def test_values_of_top_basis_have_the_derivative_of_singular_values():
    c, dc = (np.float32(t) for t in (matrix([3, 2, 1, 0.5]), RNG.normal(size=(5, 4))))
    f = lambda t: sp.top_basis(3, False, t, 2)[1]  # noqa: E731
    value, got = jax.jvp(f, (jnp.asarray(c),), (jnp.asarray(dc),))
    np.testing.assert_allclose(value, [3, 2, 0], atol=1e-5)
    ends = [np.linalg.svd(c + h * dc.astype("f8"), compute_uv=False) for h in (1e-5, -1e-5)]
    want = np.where(np.arange(3) < 2, (ends[0] - ends[1])[:3] / 2e-5, 0)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_top_pair_gives_the_cut_and_zero_where_nothing_is():
    c = jnp.asarray(matrix([3, 2, 0, 0]), jnp.float32)
    x, b, y, s = sp.top_pair(c, 3)
    np.testing.assert_allclose(x @ b @ y, c, atol=1e-5)
    np.testing.assert_allclose(s, [3, 2, 0], atol=1e-5)
    assert float(jnp.abs(x[:, 2]).max()) == 0 and float(jnp.abs(y[2]).max()) == 0


def test_basis_holds_the_span_also_of_dependent_columns():
    u = RNG.normal(size=(6, 2))
    u = jnp.asarray(np.concatenate([u, u @ RNG.normal(size=(2, 1)), 0 * u[:, :1]], 1), jnp.float32)
    q = sp.basis(u)
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(q @ (q.T @ u), u, atol=1e-5)
    grad = jax.grad(lambda t: jnp.sum(jnp.sin(sp.basis(t) @ (sp.basis(t).T @ t))))(u)
    assert np.isfinite(grad).all()


def test_basis_derivative_is_that_of_the_span():
    u, du = (jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32) for _ in range(2))
    fixed = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)

    def project(u):
        q = sp.basis(u)
        return q @ (q.T @ fixed)

    got = jax.jvp(project, (u,), (du,))[1]
    a, d = np.asarray(u, np.float64), np.asarray(du, np.float64)
    p = lambda t: t @ np.linalg.pinv(t) @ np.asarray(fixed, np.float64)  # noqa: E731
    want = (p(a + 1e-5 * d) - p(a - 1e-5 * d)) / 2e-5
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_polar_is_orthogonal_and_ignores_the_null_space():
    m = jnp.asarray(matrix([3, 2, 0, 0]), jnp.float32)
    p = sp.polar(m)
    np.testing.assert_allclose(np.linalg.svd(p, compute_uv=False), [1, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.asarray(p).T @ m, np.asarray(m).T @ p, atol=1e-5)
