"""Task arithmetic by numpy; negation and analogy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.elementwise import task_arithmetic as module
from jlora.merging.elementwise.task_arithmetic import task_arithmetic

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(3, 7, 2)), jnp.float32),
    jnp.asarray(RNG.normal(size=(3, 2, 5)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))


def product(low):
    return np.asarray(low.u) @ np.asarray(low.v)


def check():
    w = jnp.asarray([0.5, -1.0, 2.0])
    got = product(task_arithmetic(BANK, w, scale=0.3))
    np.testing.assert_allclose(got, 0.3 * np.einsum("n,nio->io", w, DENSE), rtol=1e-4, atol=1e-5)


def test_value():
    check()


def test_claim_forgetting_and_analogies():
    """A delta minus itself is nothing; b + (c - a) of deltas that share a difference is d."""
    same = LowRank(*(jnp.stack([t[0], t[0]]) for t in BANK))
    assert np.abs(product(task_arithmetic(same, jnp.asarray([1.0, -1.0])))).max() < 1e-6
    a, b, change = DENSE
    c = a + change
    four = LowRank(jnp.asarray(np.stack([a, b, c]), jnp.float32), jnp.stack([jnp.eye(5)] * 3))
    got = product(task_arithmetic(four, jnp.asarray([-1.0, 1.0, 1.0])))
    np.testing.assert_allclose(got, b + change, rtol=1e-3, atol=1e-4)


def test_limit_scale_zero():
    assert np.abs(product(task_arithmetic(BANK, jnp.ones(3), scale=0.0))).max() == 0


def test_mutation_the_scale_is_lost(monkeypatch):
    real = module.concat
    monkeypatch.setattr(module, "concat", lambda bank, w: real(bank, w / 0.3))
    with pytest.raises(AssertionError):
        check()
