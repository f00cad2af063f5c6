"""SCE by numpy, limits, the paper's claim, a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise import sce as module
from jlora.merging.elementwise.sce import sce, sce_rule
from jlora.merging.engine import streamed

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(
        RNG.normal(size=(3, 18, 2)) * np.array([1.0, 2.0, 0.5])[:, None, None], jnp.float32
    ),
    jnp.asarray(RNG.normal(size=(3, 2, 14)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, 0.3, 0.2])
WJ = jnp.asarray(W, jnp.float32)


def oracle(dense, w, density):
    var = dense.var(0)
    k = int((var > 0).sum() * density)
    chosen = np.zeros(var.size, bool)
    chosen[np.argsort(-var.ravel())[:k]] = True
    x = dense * chosen.reshape(var.shape)
    energy = w * (x**2).sum((1, 2))
    eta = energy / energy.sum()
    agree = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
    share = (eta[:, None, None] * agree).sum(0)
    return (eta[:, None, None] * agree * x).sum(0) / np.where(share == 0, 1, share)


def check(density):
    run = jax.jit(lambda b: streamed.dense(b, sce_rule(b, WJ, density=density, scale=2.0)))
    np.testing.assert_allclose(run(BANK), 2 * oracle(DENSE, W, density), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_value(density):
    check(density)


def test_factors_at_full_rank():
    low = jax.jit(lambda b: sce(b, WJ, density=0.2, rank=14))(BANK)
    np.testing.assert_allclose(low.u @ low.v, oracle(DENSE, W, 0.2), rtol=1e-3, atol=2e-3)


def test_limits():
    """Density 1: one adapter is itself, and equal ones too; with a choice they are nothing."""
    same = jax.tree.map(lambda t: jnp.broadcast_to(t[:1], t.shape), BANK)
    got = streamed.dense(same, sce_rule(same, WJ, density=1.0))
    np.testing.assert_allclose(got, DENSE[0], rtol=1e-4, atol=1e-5)
    one = jax.tree.map(lambda t: t[:1], BANK)
    assert float(jnp.abs(streamed.dense(one, sce_rule(one, jnp.ones(1), density=0.5))).max()) == 0


def test_claim_coefficients_follow_the_energy_of_what_was_learned():
    """Where all agree in sign, an adapter that learned nothing does not dilute one that did."""
    loud = np.abs(RNG.normal(size=(20, 20)))
    quiet = 0.05 * np.abs(RNG.normal(size=(20, 20)))
    bank = LowRank(jnp.asarray(np.stack([loud, quiet]), jnp.float32), jnp.stack([jnp.eye(20)] * 2))
    merged = streamed.dense(bank, sce_rule(bank, jnp.full(2, 0.5), density=1.0))
    assert np.linalg.norm(merged - loud) < 0.02 * np.linalg.norm(loud)
    assert np.linalg.norm((loud + quiet) / 2 - loud) > 0.4 * np.linalg.norm(loud)


def test_mutation_selection_of_the_mean_instead_of_the_variance(monkeypatch):
    monkeypatch.setattr(module, "variance", lambda d, w: jnp.mean(d, 0, keepdims=True) ** 2)
    with pytest.raises(AssertionError):
        check(0.2)


def test_bad_density():
    with pytest.raises(ValueError, match="density: got"):
        sce(BANK, WJ, density=0.0)
