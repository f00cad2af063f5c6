"""The vote over signs, by hand and by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.merging.engine import election

X = np.random.default_rng(0).normal(size=(5, 4, 3)) * (
    np.random.default_rng(1).random((5, 4, 3)) < 0.7
)
W = np.array([0.5, 0.3, 0.2, 1.0, 0.7])


def oracle(x, w, vote, normalize):
    out = np.zeros(x.shape[1:])
    for at in np.ndindex(*x.shape[1:]):
        y = [w[n] * x[(n, *at)] for n in range(len(w))]
        s = 1 if sum(y if vote == "sum" else np.sign(y)) >= 0 else -1
        yes = [n for n in range(len(w)) if np.sign(y[n]) == s]
        out[at] = sum(y[n] for n in yes) / ((sum(abs(w[n]) for n in yes) or 1) if normalize else 1)
    return out


def run(x, w, **options):
    return election.elect(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), **options)


def check(vote, normalize, w=W):
    got = run(X, w, vote=vote, normalize=normalize)
    np.testing.assert_allclose(got, oracle(X, w, vote, normalize), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vote", election.VOTES)
@pytest.mark.parametrize("normalize", [True, False])
def test_value(vote, normalize):
    check(vote, normalize)
    check(vote, normalize, W * np.array([1, -1, 1, 1, -1]))


def test_by_hand():
    """Two small positives lose against a large negative by sum, and win by count; draws are +."""
    x, w = np.array([[1.0], [2.0], [-4.0]]), np.ones(3)
    assert float(run(x, w)[0]) == -4.0
    assert float(run(x, w, vote="count")[0]) == 1.5
    assert float(run(np.array([[1.0], [-1.0]]), np.ones(2))[0]) == 1.0


def test_a_negative_weight_subtracts_and_nothing_explodes():
    """[-1] is minus the adapter; [1, -0.999] of equal ones is between them, not 1000 times one."""
    np.testing.assert_allclose(run(X[:1], [-1.0]), -X[0], rtol=1e-6)
    for weights in ([1.0, -0.999], [1.0, -1.0], [-0.5, 0.2]):
        got = np.asarray(run(np.stack([X[0], 2 * X[0]]), weights))
        assert (np.abs(got) <= 2 * np.abs(X[0]) * (1 + 1e-6)).all()
    turned = X * np.sign([1, -1, 1, -1, 1])[:, None, None]
    signed = run(X, W * np.array([1, -1, 1, -1, 1]))
    np.testing.assert_allclose(signed, run(turned, W), rtol=1e-6)


def test_limits():
    """One adapter is itself; nothing is nothing; equal adapters are themselves at any weights."""
    np.testing.assert_allclose(run(X[:1], W[:1]), X[0], rtol=1e-6)
    np.testing.assert_array_equal(run(np.zeros((3, 2)), np.ones(3)), 0)
    np.testing.assert_allclose(run(np.stack([X[0]] * 5), W), X[0], rtol=1e-5, atol=1e-7)


def test_gradient_is_finite():
    g = jax.grad(lambda w: jnp.sum(election.elect(jnp.asarray(X, jnp.float32), w)))(jnp.ones(5))
    assert bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0


def test_mutation_the_minority_wins(monkeypatch):
    real = election.majority
    monkeypatch.setattr(election, "majority", lambda y, vote: -real(y, vote))
    with pytest.raises(AssertionError):
        check("sum", True)


def test_bad_vote():
    with pytest.raises(ValueError, match="vote: got 'mean'"):
        run(X, W, vote="mean")
