"""DARE given its masks, by numpy; unbiased; limits; a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.dare import dare_linear, dare_linear_rule, dare_ties, dare_ties_rule
from jlora.merging.engine import masks, streamed

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(3, 18, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(3, 2, 14)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, 0.3, 0.2])
WJ = jnp.asarray(W, jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 3)


def dropped(density):
    """The masked and rescaled deltas: bits as masks.py draws them, all the rest by numpy."""
    p = np.round(np.broadcast_to(density, 3) * 65536)[:, None, None]
    bits = np.asarray(masks.words(KEYS, jnp.arange(18), 14), float)
    return np.where(bits < p, DENSE, 0) / (p / 65536)


def check(density):
    x = dropped(density)
    run = jax.jit(lambda b, w: streamed.dense(b, dare_linear_rule(b, w, keys=KEYS, scale=2.0,
                                                                  density=density)))  # fmt: skip
    expected = 2.0 * np.einsum("n,nio->io", W, x)
    np.testing.assert_allclose(run(BANK, WJ), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.4, (0.2, 1.0, 0.7)])
def test_linear_value(density):
    check(density)


def test_ties_value():
    y = W[:, None, None] * dropped(0.4)
    agree = np.sign(y) == np.where(y.sum(0) >= 0, 1, -1)
    share = (W[:, None, None] * agree).sum(0)
    expected = 2.0 * (y * agree).sum(0) / np.where(share == 0, 1, share)
    run = jax.jit(lambda b: streamed.dense(b, dare_ties_rule(b, WJ, keys=KEYS, density=0.4,
                                                             scale=2.0)))  # fmt: skip
    np.testing.assert_allclose(run(BANK), expected, rtol=1e-4, atol=1e-5)


def test_nothing_dropped_is_task_arithmetic():
    low = jax.jit(lambda b: dare_linear(b, WJ, keys=KEYS, density=1.0))(BANK)
    np.testing.assert_allclose(
        low.u @ low.v, np.einsum("n,nio->io", W, DENSE), rtol=1e-3, atol=1e-4
    )


def test_nothing_dropped_is_the_vote_of_all():
    got = streamed.dense(BANK, dare_ties_rule(BANK, WJ, keys=KEYS, density=1.0))
    y = W[:, None, None] * DENSE
    agree = np.sign(y) == np.sign(y.sum(0))
    expected = (y * agree).sum(0) / (W[:, None, None] * agree).sum(0)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_factors_at_full_rank():
    low = jax.jit(lambda b: dare_ties(b, WJ, keys=KEYS, density=0.4, rank=14))(BANK)
    expected = streamed.dense(BANK, dare_ties_rule(BANK, WJ, keys=KEYS, density=0.4))
    np.testing.assert_allclose(low.u @ low.v, expected, rtol=1e-3, atol=1e-3)


def test_claim_dropping_is_unbiased_and_without_rescaling_it_is_not():
    """The paper's: the mean stays at a drop rate of 70 %; without rescaling it shrinks."""

    @jax.jit
    @jax.vmap
    def run(key):
        keys = jax.random.split(key, 3)
        return streamed.dense(BANK, dare_linear_rule(BANK, WJ, keys=keys, density=0.3))

    many = np.asarray(run(jax.random.split(jax.random.key(5), 2000)))
    exact = np.einsum("n,nio->io", W, DENSE)
    z = (many.mean(0) - exact) / (many.std(0) / np.sqrt(2000) + 1e-12)
    assert np.abs(z).max() < 5
    plain = np.abs(0.3 * many.mean(0) - exact).max()
    assert plain > 0.5 * np.abs(exact).max()


def test_mutation_masks_without_rescaling(monkeypatch):
    real = masks.dropped
    monkeypatch.setitem(dare_linear_rule.__globals__, "dropped", lambda *a: real(*a, rescale=False))
    with pytest.raises(AssertionError):
        check(0.4)


@pytest.mark.parametrize("bad", [0.0, 1.5, 1e-6, (0.5, 0.5)])
def test_bad_density(bad):
    with pytest.raises(ValueError, match="density: got"):
        dare_linear(BANK, WJ, keys=KEYS, density=bad)
