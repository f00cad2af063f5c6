"""Spherical means against dense vectors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.exact.slerp import multislerp, nuslerp, slerp

AXES = {"flat": (0, 1), "out": 0, "in": 1}
FUNCTIONS = {"flat": nuslerp, "out": slerp, "in": slerp}


def by_numpy(a, b, t, axis):
    na, nb, ab = ((x * y).sum(AXES[axis], keepdims=True) for x, y in ((a, a), (b, b), (a, b)))
    omega = np.arccos(ab / np.sqrt(na * nb))
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def check(function, axis, make, dense):
    bank = make(n=2)
    a, b = dense(bank)
    got = dense(function(bank, jnp.asarray([1.4, 0.6])))
    np.testing.assert_allclose(got, by_numpy(a, b, 0.3, axis), atol=2e-5)


@pytest.mark.parametrize("axis", AXES)
def test_value_by_numpy(axis, make, dense):
    check(lambda b, w: slerp(b, w, axis=axis), axis, make, dense)
    if axis == "flat":
        check(nuslerp, axis, make, dense)


def test_mutation_another_axis_is_another_mean(make, dense):
    with pytest.raises(AssertionError):
        check(slerp, "flat", make, dense)


def test_ends_norm_and_parallel_vectors(make, dense):
    """t = 0 and 1 are the adapters; equal norms are kept; parallel vectors are interpolated."""
    bank = make(n=2)
    for k in range(2):
        w = jnp.asarray([1.0 - k, 0.0 + k])
        np.testing.assert_allclose(dense(slerp(bank, w)), dense(bank)[k], atol=1e-5)
    norms = np.linalg.norm(dense(bank), axis=(1, 2))
    same = LowRank(bank.u / jnp.asarray(norms, jnp.float32)[:, None, None], bank.v)
    half = jnp.asarray([0.5, 0.5])
    np.testing.assert_allclose(np.linalg.norm(dense(nuslerp(same, half))), 1, rtol=1e-5)
    assert np.linalg.norm(dense(same).mean(0)) < 0.9  # an average shrinks
    scaled = LowRank(jnp.stack([bank.u[0], 3 * bank.u[0]]), jnp.stack([bank.v[0]] * 2))
    np.testing.assert_allclose(dense(slerp(scaled, half)), 2 * dense(bank)[0], atol=1e-5)


def test_the_gradient_of_parallel_vectors_is_finite(make):
    bank = jax.tree.map(lambda t: jnp.stack([t[0], t[0]]), make())
    for method in (slerp, nuslerp, multislerp):

        def f(b, w, method=method):
            low = method(b, w)
            return jnp.sum(jnp.sin(low.u @ low.v))

        slopes = jax.grad(f, (0, 1))(bank, jnp.ones(2))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))


def test_the_gradient_where_nothing_moves_is_finite():
    """One adapter of one element is its own mean exactly."""
    one = LowRank(jnp.full((1, 1, 1), 2.0), jnp.ones((1, 1, 1)))
    slopes = jax.grad(lambda b: jnp.sum(jnp.sin(multislerp(b, jnp.ones(1)).u)))(one)
    assert all(np.isfinite(t).all() for t in jax.tree.leaves(slopes))


def test_multislerp_by_numpy(make, dense):
    bank, w = make(), np.array([0.5, 0.3, 0.2])
    y = dense(bank).reshape(3, -1)
    norm = np.linalg.norm(y, axis=1)
    unit = y / norm[:, None]
    m = w @ unit / np.linalg.norm(w @ unit)
    cos = unit @ m
    gap = unit - cos[:, None] * m
    log = gap / np.linalg.norm(gap, axis=1, keepdims=True) * np.arccos(cos)[:, None]
    step = w @ log
    size = np.linalg.norm(step)
    want = (w @ norm) * (np.cos(size) * m + np.sin(size) * step / size)
    got = multislerp(bank, jnp.asarray(2 * w, jnp.float32))  # only ratios matter
    np.testing.assert_allclose(dense(got).ravel(), want, atol=1e-5)


def test_multislerp_of_two_is_the_slerp_of_their_directions(make, dense):
    bank, half = make(n=2), jnp.asarray([0.5, 0.5])
    norms = jnp.asarray(np.linalg.norm(dense(bank), axis=(1, 2)), jnp.float32)
    same = LowRank(bank.u / norms[:, None, None], bank.v)
    got = dense(multislerp(same, half))
    np.testing.assert_allclose(got, dense(nuslerp(same, half)), atol=1e-5)
    assert np.linalg.norm(got) > 0.999 > 1.1 * np.linalg.norm(dense(same).mean(0))  # no shrinking


def test_zero_adapters_have_no_direction(make, dense):
    bank = make()
    bank = LowRank(bank.u.at[2].set(0.0), bank.v)
    w = jnp.asarray([0.5, 0.3, 0.2])
    want = dense(multislerp(jax.tree.map(lambda t: t[:2], bank), w[:2]))
    np.testing.assert_allclose(dense(multislerp(bank, w)), want, atol=1e-5)


def test_bad_arguments(make):
    with pytest.raises(ValueError, match="got 3 adapters, expected 2"):
        slerp(make(), jnp.ones(3))
    with pytest.raises(ValueError, match="axis: got 'row'"):
        slerp(make(n=2), jnp.ones(2), axis="row")
