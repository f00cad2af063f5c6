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


def oracle(x, w, vote, normalise):
    out = np.zeros(x.shape[1:])
    for at in np.ndindex(*x.shape[1:]):
        y = [w[n] * x[(n, *at)] for n in range(len(w))]
        s = 1 if sum(y if vote == "sum" else np.sign(y)) >= 0 else -1
        yes = [n for n in range(len(w)) if np.sign(y[n]) == s]
        out[at] = sum(y[n] for n in yes) / ((sum(w[n] for n in yes) or 1) if normalise else 1)
    return out


def run(x, w, **options):
    return election.elect(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), **options)


def check(vote, normalise, w=W):
    got = run(X, w, vote=vote, normalise=normalise)
    np.testing.assert_allclose(got, oracle(X, w, vote, normalise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vote", election.VOTES)
@pytest.mark.parametrize("normalise", [True, False])
def test_value(vote, normalise):
    check(vote, normalise)
    check(vote, normalise, W * np.array([1, -1, 1, 1, -1]))


def test_by_hand():
    """Two small positives lose against a large negative by sum, and win by count; draws are +."""
    x, w = np.array([[1.0], [2.0], [-4.0]]), np.ones(3)
    assert float(run(x, w)[0]) == -4.0
    assert float(run(x, w, vote="count")[0]) == 1.5
    assert float(run(np.array([[1.0], [-1.0]]), np.ones(2))[0]) == 1.0


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
