"""Magnitude pruning by numpy, limits, a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.magnitude import magnitude, magnitude_rule
from jlora.merging.engine import streamed, threshold

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(3, 18, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(3, 2, 14)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, -0.3, 0.8])


def check(density):
    run = jax.jit(lambda b, w: streamed.dense(b, magnitude_rule(b, w, density=density, scale=0.5)))
    k = int(density * DENSE[0].size)
    cut = np.array([np.sort(np.abs(d).ravel())[-k] for d in DENSE])
    expected = 0.5 * np.einsum("n,nio->io", W, DENSE * (np.abs(DENSE) >= cut[:, None, None]))
    np.testing.assert_allclose(run(BANK, jnp.asarray(W, jnp.float32)), expected, rtol=1e-4,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_value(density):
    check(density)


def test_density_one_is_task_arithmetic():
    low = jax.jit(lambda b, w: magnitude(b, w, density=1.0))(BANK, jnp.asarray(W, jnp.float32))
    expected = np.einsum("n,nio->io", W, DENSE)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-4)


def test_claim_most_elements_are_redundant():
    """The largest tenth of a heavy-tailed delta holds most of its energy (a random tenth: 10 %)."""
    u = np.exp(2.0 * RNG.normal(size=(1, 40, 2))) * np.sign(RNG.normal(size=(1, 40, 2)))
    v = np.exp(2.0 * RNG.normal(size=(1, 2, 30))) * np.sign(RNG.normal(size=(1, 2, 30)))
    bank = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))
    kept = streamed.dense(bank, magnitude_rule(bank, jnp.ones(1), density=0.1))
    assert np.linalg.norm(kept) ** 2 > 0.9 * np.linalg.norm(u @ v) ** 2


def test_mutation_the_smallest_are_kept(monkeypatch):
    real = threshold.above
    monkeypatch.setattr(threshold, "above", lambda x, t: ~real(x, t))
    with pytest.raises(AssertionError):
        check(0.6)
