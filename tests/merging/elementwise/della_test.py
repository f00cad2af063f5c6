"""DELLA given its bits, by numpy; unbiased; limits; the paper's claim; a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.della import della, della_linear, della_rule, magprune
from jlora.merging.engine import masks, streamed

N, D_IN, D_OUT = 3, 18, 14
RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(N, D_IN, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(N, 2, D_OUT)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, 0.3, 0.2])
WJ = jnp.asarray(W, jnp.float32)
KEYS = jax.random.split(jax.random.key(0), N)


def dropped(rho, eps):
    """One element at a time, as the docstring says; only the bits are those of masks.py."""
    bits = np.asarray(masks.words(KEYS, jnp.arange(D_OUT), D_IN), float)  # [N, outputs, inputs]
    out = np.zeros_like(DENSE)
    for n in range(N):
        for j in range(D_OUT):
            column = np.abs(DENSE[n, :, j])
            for i in range(D_IN):
                p = rho - eps + 2 * eps * (column < column[i]).sum() / (D_IN - 1)
                p = np.round(p * 65536) / 65536
                out[n, i, j] = DENSE[n, i, j] / p if bits[n, j, i] < 65536 * p else 0
    return out


def check():
    y = W[:, None, None] * dropped(0.6, 0.2)
    agree = np.sign(y) == np.where(y.sum(0) >= 0, 1, -1)
    share = (W[:, None, None] * agree).sum(0)
    expected = (y * agree).sum(0) / np.where(share == 0, 1, share)
    low = jax.jit(lambda b: della(b, WJ, keys=KEYS, density=0.6, epsilon=0.2, rank=D_OUT))(BANK)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-2, atol=1e-3)


def test_value():
    check()


def test_linear_value():
    run = jax.jit(lambda b: della_linear(b, WJ, keys=KEYS, density=0.6, epsilon=0.2, rank=D_OUT,
                                         scale=0.5))  # fmt: skip
    low = run(BANK)
    expected = 0.5 * np.einsum("n,nio->io", W, dropped(0.6, 0.2))
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-2, atol=1e-3)


def test_limits():
    """Density 1 is task arithmetic; epsilon 0 drops all elements at one rate, as DARE does."""
    low = jax.jit(lambda b: della_linear(b, WJ, keys=KEYS, density=1.0))(BANK)
    expected = np.einsum("n,nio->io", W, DENSE)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-4)
    d, rows = jnp.ones((N, 5, 40)), jnp.arange(5)
    flat = magprune(0.25, 0.0, KEYS)(d, rows)
    same = masks.dropped(d, jnp.full((N, 1, 1), 0.25), KEYS, rows)
    np.testing.assert_array_equal(flat, same)


def test_density_one_is_the_vote_of_all():
    low = jax.jit(lambda b: della(b, WJ, keys=KEYS, density=1.0, rank=D_OUT))(BANK)
    y = W[:, None, None] * DENSE
    agree = np.sign(y) == np.sign(y.sum(0))
    expected = (y * agree).sum(0) / (W[:, None, None] * agree).sum(0)
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-3)


def test_claim_large_elements_stay_and_the_mean_too():
    """Rates by rank: of the largest quarter nearly all stay; the mean of all is exact."""
    d = jnp.asarray(RNG.normal(size=(N, 3, 40)), jnp.float32)

    @jax.jit
    @jax.vmap
    def run(key):
        return magprune(0.5, 0.45, jax.random.split(key, N))(d, jnp.arange(3))

    many = np.asarray(run(jax.random.split(jax.random.key(5), 3000)))
    z = (many.mean(0) - np.asarray(d)) / (many.std(0) / np.sqrt(3000) + 1e-12)
    assert np.abs(z).max() < 5
    place = np.argsort(np.argsort(np.abs(d), -1), -1)
    rate = (many != 0).mean(0)
    assert rate[place >= 30].mean() > 0.8 and rate[place < 10].mean() < 0.2
    np.testing.assert_allclose(rate, 0.05 + 0.9 * place / 39, atol=0.05)


def test_mutation_ranks_reversed(monkeypatch):
    real = jnp.abs
    monkeypatch.setattr(jnp, "abs", lambda x: -real(x))
    with pytest.raises(AssertionError):
        check()


def test_streams_outputs():
    turned = streamed.flip(BANK)
    rule = della_rule(turned, WJ, keys=KEYS, density=0.6)
    whole = jax.jit(lambda: streamed.dense(turned, rule, block=14))()
    np.testing.assert_allclose(
        jax.jit(lambda: streamed.dense(turned, rule, block=3))(), whole, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("density, epsilon", [(0.1, 0.15), (0.9, 0.15), (0.5, -0.1)])
def test_bad_density(density, epsilon):
    with pytest.raises(ValueError, match="density, epsilon: got"):
        della(BANK, WJ, keys=KEYS, density=density, epsilon=epsilon)
