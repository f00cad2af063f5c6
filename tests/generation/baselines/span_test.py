"""Span projection: least squares oracle, members and outsiders."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.baselines import soup, span

RNG = np.random.default_rng(0)
Y = RNG.normal(size=(6, 20)).astype("f4") + 1
T = RNG.normal(size=(3, 20)).astype("f4")


def parts(y, t):
    return jnp.asarray(y @ y.T), jnp.asarray(t @ y.T), jnp.asarray((t**2).sum(1))


def test_projection_matches_least_squares():
    gram, cross, norms = parts(Y, T)
    weights = span.affine_weights(gram, cross)
    np.testing.assert_allclose(jnp.sum(weights, axis=1), 1, atol=1e-5)
    mean = Y.mean(0)
    basis = (Y[1:] - Y[0]).astype("f8")  # n - 1 independent directions
    beta = np.linalg.lstsq(basis.T, (T - mean).T, rcond=None)[0]
    want = mean + beta.T @ basis
    np.testing.assert_allclose(soup.combine(weights, jnp.asarray(Y)), want, atol=1e-3)
    relative = np.linalg.norm(T - want, axis=1) / np.linalg.norm(T, axis=1)
    got = span.residual(weights, gram, cross, norms)
    np.testing.assert_allclose(got, relative, atol=1e-3)
    # Mutation: any other affine combination is further away.
    worse = span.residual(weights + jnp.asarray(Y[:3, :6] - Y[:3, :6].mean(1, keepdims=True)) * 0.1,
                          gram, cross, norms)  # fmt: skip
    assert (np.asarray(worse) > np.asarray(got) + 1e-3).all()


def test_members_are_reached_and_zero_components_give_the_mean():
    gram, cross, norms = parts(Y, Y[:2])
    inside = span.affine_weights(gram, cross)
    np.testing.assert_allclose(inside, np.eye(6)[:2], atol=1e-3)
    assert (np.asarray(span.residual(inside, gram, cross, norms)) < 5e-3).all()
    mean = span.affine_weights(gram, cross, components=0)
    np.testing.assert_allclose(mean, 1 / 6, atol=1e-6)


def test_copies_add_no_direction():
    gram, cross, _ = parts(np.concatenate([Y, Y]), T)
    once = span.affine_weights(*parts(Y, T)[:2])
    twice = span.affine_weights(gram, cross)
    np.testing.assert_allclose(twice[:, :6] + twice[:, 6:], once, atol=2e-3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"cross \(3, 5\)"):
        span.affine_weights(jnp.eye(6), jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"components 6, expected 0..5"):
        span.affine_weights(jnp.eye(6), jnp.ones((3, 6)), components=6)
