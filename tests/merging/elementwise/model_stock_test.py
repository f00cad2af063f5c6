"""Model stock by dense numpy, limits, the paper's claim, a mutation."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.model_stock import model_stock, ratio

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(2, 2, 9, 2))
BANK = LowRank(
    jnp.asarray(BASE[0, 0] + 0.6 * RNG.normal(size=(4, 9, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(2, 7)) + 0.6 * RNG.normal(size=(4, 2, 7)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.4, 0.3, 0.2, 0.1])


def cosines(x):
    """The mean over pairs of the cosine along the flattened first axis; x [N, k, m] -> [m]."""
    n = len(x)
    every = [
        (x[a] * x[b]).sum(0) / np.linalg.norm(x[a], axis=0) / np.linalg.norm(x[b], axis=0)
        for a in range(n)
        for b in range(a + 1, n)
    ]
    return np.mean(every, axis=0)


def oracle(outputs):
    x = DENSE if outputs else DENSE.reshape(4, -1, 1)
    c = cosines(x)
    t = 4 * c / (1 + 3 * c)
    return t * np.einsum("n,nio->io", W, DENSE)


def check(outputs):
    low = model_stock(BANK, jnp.asarray(W, jnp.float32), outputs=outputs)
    np.testing.assert_allclose(low.u @ low.v, oracle(outputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("outputs", [False, True])
def test_value(outputs):
    check(outputs)


def test_limits():
    """Equal adapters: t = 1. Orthogonal ones: t = 0, the base. One adapter: itself."""
    same = LowRank(*(jnp.broadcast_to(t[:1], t.shape) for t in BANK))
    np.testing.assert_allclose(ratio(same), 1.0, rtol=1e-5)
    u = jnp.eye(6).reshape(6, 3, 2).swapaxes(0, 1)
    apart = LowRank(u, jnp.ones((3, 2, 5)))
    np.testing.assert_allclose(ratio(apart), 0.0, atol=1e-6)
    one = LowRank(BANK.u[:1], BANK.v[:1])
    low = model_stock(one, jnp.ones(1))
    np.testing.assert_allclose(low.u @ low.v, DENSE[0], rtol=1e-4, atol=1e-5)
    opposed = LowRank(jnp.stack([BANK.u[0], -BANK.u[0]]), jnp.stack([BANK.v[0]] * 2))
    np.testing.assert_array_equal(ratio(opposed), 0.0)
    assert bool(jnp.isfinite(ratio(LowRank(*(jnp.zeros_like(t) for t in BANK)))).all())


def test_claim_closer_to_the_centre_than_the_average():
    """Fine-tuned weights scatter around a centre; two with this ratio are closer to it than two."""
    rng, size = np.random.default_rng(1), 60
    centre = rng.normal(size=(size, size))
    gain = []
    for _ in range(5):
        pair = np.stack([centre + 1.5 * rng.normal(size=(size, size)) for _ in range(2)])
        bank = LowRank(jnp.asarray(pair, jnp.float32), jnp.stack([jnp.eye(size)] * 2))
        low = model_stock(bank, jnp.full(2, 0.5))
        merged = np.asarray(low.u @ low.v)
        gain.append(np.linalg.norm(merged - centre) / np.linalg.norm(pair.mean(0) - centre))
    assert max(gain) < 0.85


def test_mutation_weights_of_the_mean_are_lost():
    with pytest.raises(AssertionError):
        low = model_stock(BANK, jnp.full(4, 0.25))
        np.testing.assert_allclose(low.u @ low.v, oracle(False), rtol=1e-3, atol=1e-4)


def test_mutation_ratio_of_the_outputs_for_the_site():
    with pytest.raises(AssertionError):
        low = model_stock(BANK, jnp.asarray(W, jnp.float32), outputs=True)
        np.testing.assert_allclose(low.u @ low.v, oracle(False), rtol=1e-3, atol=1e-4)
