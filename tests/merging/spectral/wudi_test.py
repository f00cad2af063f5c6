"""WUDI: the minimum of its loss, by least squares on dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.exact.concat import concat
from jlora.merging.spectral.wudi import wudi

W = np.array([0.5, 0.3, 0.2])
W32 = jnp.asarray(W, jnp.float32)


def loss(m, deltas, w):
    return sum(
        c * ((d.T @ (m - d)) ** 2).sum() / (d**2).sum() for c, d in zip(w, deltas, strict=True)
    )


def by_numpy(deltas, w):
    g = sum(c * d @ d.T / (d**2).sum() for c, d in zip(w, deltas, strict=True))
    r = sum(c * d @ d.T @ d / (d**2).sum() for c, d in zip(w, deltas, strict=True))
    return np.linalg.pinv(g, rcond=1e-9) @ r


def check(function, make, dense, **shape):
    bank = make(**shape)
    want = by_numpy(dense(bank), W)
    np.testing.assert_allclose(dense(function(bank, W32)), want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("shape", [{"d_in": 9}, {"d_in": 4}], ids=["independent", "crowded"])
def test_value_by_the_normal_equations(shape, make, dense):
    check(wudi, make, dense, **shape)


def test_mutation_the_sum_is_not_the_minimum(make, dense):
    with pytest.raises(AssertionError):
        check(concat, make, dense, d_in=9)


def test_it_is_a_minimum(make, dense):
    """No direction lowers the loss; the sum and the mean are far above."""
    bank = make(d_in=4)
    deltas, m = dense(bank), dense(wudi(bank, W32))
    least = loss(m, deltas, W)
    rng = np.random.default_rng(0)
    assert all(loss(m + 0.1 * rng.normal(size=m.shape), deltas, W) > least for _ in range(20))
    assert loss(deltas.sum(0), deltas, W) > 2 * least and loss(deltas.mean(0), deltas, W) > least


def test_independent_inputs_do_not_interfere(make, dense):
    """The claim: on the inputs of an adapter the merge is that adapter."""
    bank = make(d_in=9)
    deltas, m = dense(bank), dense(wudi(bank, W32))
    for d in deltas:
        inputs = np.linalg.svd(d)[0][:, :2]
        np.testing.assert_allclose(inputs.T @ m, inputs.T @ d, atol=1e-4 * np.abs(d).max())
    assert loss(m, deltas, W) < 1e-8 * loss(deltas.sum(0), deltas, W)


def test_only_ratios_of_weights_matter_and_zero_adapters_do_not(make, dense):
    bank = make(d_in=4)
    want = dense(wudi(bank, W32))
    np.testing.assert_allclose(dense(wudi(bank, 7 * W32)), want, atol=1e-3)
    more = LowRank(*(jnp.concatenate([t, 0 * t[:1]]) for t in bank))
    w = jnp.concatenate([W32, jnp.ones(1)])
    np.testing.assert_allclose(dense(wudi(more, w)), want, atol=1e-3)

    def f(b, w):
        low = wudi(b, w)
        return jnp.sum(jnp.sin(low.u @ low.v))

    for slopes in (jax.grad(f, (0, 1))(bank, W32), jax.grad(f, (0, 1))(more, w)):
        assert all(np.isfinite(t).all() and np.any(t != 0) for t in jax.tree.leaves(slopes))
