"""Consensus merging by numpy, limits, the paper's claim, a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise.consensus import consensus, consensus_rule
from jlora.merging.engine import streamed

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(3, 18, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(3, 2, 14)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, 0.7, 0.9])
WJ = jnp.asarray(W, jnp.float32)


def oracle(sharpness, least):
    total = np.einsum("n,nio->io", W, DENSE)
    uses = sum((np.abs(d) >= sharpness * np.abs(total - d)).astype(int) for d in DENSE)
    return np.where(uses >= least, total, 0)


def dense(**options):
    return jax.jit(lambda b: streamed.dense(b, consensus_rule(b, WJ, **options)))(BANK)


def check(sharpness, least):
    got = dense(sharpness=sharpness, least=least)
    np.testing.assert_allclose(got, oracle(sharpness, least), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharpness, least", [(0.4, 2), (1.0, 1), (0.2, 3)])
def test_value(sharpness, least):
    check(sharpness, least)


def test_limits():
    """`least` 0, and sharpness 0, leave the sum; factors at full rank are the matrix."""
    total = np.einsum("n,nio->io", W, DENSE)
    np.testing.assert_allclose(dense(least=0), total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dense(sharpness=0.0, least=3), total, rtol=1e-4, atol=1e-5)
    low = jax.jit(lambda b: consensus(b, WJ, rank=14))(BANK)
    np.testing.assert_allclose(low.u @ low.v, oracle(0.4, 2), rtol=1e-3, atol=1e-3)


def test_claim_selfish_and_catastrophic_elements_go():
    """A region that all tasks use stays; one that a single task uses, or only their noise, goes."""
    delta = np.zeros((4, 12, 12))
    delta[:, :4] = 1.0 + 0.1 * RNG.normal(size=(4, 4, 12))  # general
    delta[0, 4:8] = 5.0  # selfish
    bank = LowRank(jnp.asarray(delta, jnp.float32), jnp.stack([jnp.eye(12)] * 4))
    merged = np.asarray(
        streamed.dense(bank, consensus_rule(bank, jnp.ones(4), sharpness=0.3, least=2))
    )
    np.testing.assert_allclose(merged[:4], delta[:, :4].sum(0), rtol=1e-4)
    assert np.abs(merged[4:]).max() == 0


def test_mutation_masks_against_the_sum_itself(monkeypatch):
    def wrong(d, total, sharpness):
        return (jnp.abs(d) >= sharpness * jnp.abs(total[None])).astype(jnp.int32)

    monkeypatch.setitem(consensus_rule.__globals__, "task_masks", wrong)
    with pytest.raises(AssertionError):
        check(0.4, 2)


@pytest.mark.parametrize("bad", [{"sharpness": -1.0}, {"least": 4}, {"least": -1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        consensus(BANK, WJ, **bad)
