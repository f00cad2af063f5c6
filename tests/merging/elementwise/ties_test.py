"""TIES by numpy, its limits, the paper's claim, a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.ties import ties, ties_rule
from jlora.merging.engine import election, streamed, threshold

N, D_IN, D_OUT, R = 4, 18, 14, 3
RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(N, D_IN, R)), jnp.float32),
    jnp.asarray(RNG.normal(size=(N, R, D_OUT)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.4, 0.3, 0.2, 0.1])


def oracle(dense, w, density, vote="sum", normalize=True):
    """Trim, elect, disjoint mean; every step as the paper's algorithm 1 says it."""
    out = np.zeros_like(dense)
    for n in range(len(w)):
        p = density[n] if isinstance(density, tuple) else density
        order = np.argsort(-np.abs(dense[n]).ravel())[: int(p * dense[n].size)]
        out[n].ravel()[order] = dense[n].ravel()[order]
    y = w[:, None, None] * out
    s = np.where((y if vote == "sum" else np.sign(y)).sum(0) >= 0, 1, -1)
    agree = np.sign(y) == s
    share = (w[:, None, None] * agree).sum(0)
    return (y * agree).sum(0) / (np.where(share == 0, 1, share) if normalize else 1)


def check(density, vote="sum", normalize=True):
    def run(bank, w):
        rule = ties_rule(bank, w, density=density, vote=vote, normalize=normalize, scale=0.5)
        return streamed.dense(bank, rule)

    got = jax.jit(run)(BANK, jnp.asarray(W, jnp.float32))
    expected = 0.5 * oracle(DENSE, W, density, vote, normalize)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"vote": "count"}, {"normalize": False}, {"density": (0.1, 0.5, 1.0, 0.3)}]
)
def test_value(options):
    check(**{"density": 0.3, **options})


def test_a_traced_density_gives_the_same():
    run = jax.jit(lambda p: streamed.dense(BANK, ties_rule(BANK, jnp.asarray(W, jnp.float32),
                                                           density=p)))  # fmt: skip
    np.testing.assert_allclose(run(jnp.float32(0.3)), oracle(DENSE, W, 0.3), rtol=1e-4, atol=1e-5)


def test_factors():
    """At full rank the factors are the matrix."""
    low = jax.jit(lambda b, w: ties(b, w, density=0.3, rank=D_OUT))(
        BANK, jnp.asarray(W, jnp.float32)
    )
    np.testing.assert_allclose(low.u @ low.v, oracle(DENSE, W, 0.3), rtol=1e-3, atol=1e-3)


def test_density_one_without_conflict_is_the_weighted_mean():
    """The limit: equal signs and nothing trimmed leave task arithmetic."""
    bank = jax.tree.map(jnp.abs, BANK)
    rule = ties_rule(bank, jnp.asarray(W, jnp.float32), density=1.0)
    expected = np.einsum("n,nir,nro->io", W, *map(np.asarray, bank))
    np.testing.assert_allclose(streamed.dense(bank, rule), expected, rtol=1e-4)


def test_claim_interference_is_resolved():
    """Redundant noise of some adapters and sign conflicts dilute a mean; TIES keeps what one needs.

    Each task changes its own few entries by a lot and all others by a little.
    """
    rng, tasks, size = np.random.default_rng(1), 4, 16
    signal = np.zeros((tasks, size, size))
    for t in range(tasks):
        signal[t, 4 * t : 4 * t + 4] = np.sign(rng.normal(size=(4, size)))
    delta = signal + 0.2 * rng.normal(size=signal.shape)
    bank = LowRank(jnp.asarray(delta, jnp.float32), jnp.stack([jnp.eye(size)] * tasks))
    w = jnp.full(tasks, 1.0 / tasks)
    merged = streamed.dense(bank, ties_rule(bank, w, density=0.25))
    wanted = signal.sum(0)

    def error(x):
        return np.linalg.norm(np.asarray(x) - wanted) / np.linalg.norm(wanted)

    assert error(merged) < 0.6 * error(delta.mean(0))
    assert error(merged) < error(delta.sum(0))


def test_mutation_a_vote_that_nobody_loses(monkeypatch):
    monkeypatch.setattr(election, "majority", lambda y, vote: jnp.sign(y[0]))
    with pytest.raises(AssertionError):
        check(0.3)


def test_mutation_trimmed_elsewhere(monkeypatch):
    """A threshold of a few elements more than `density` says is seen in the result."""
    real = threshold.kept
    monkeypatch.setattr(threshold, "kept", lambda *args: real(*args) + 12)  # 5 % of 252
    with pytest.raises(AssertionError):
        check(0.3)


def test_bad_density():
    with pytest.raises(ValueError, match=r"density: got 1\.2"):
        ties(BANK, jnp.asarray(W, jnp.float32), density=1.2)
