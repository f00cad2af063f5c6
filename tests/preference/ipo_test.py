"""IPO: value by numpy; the margin that is aimed at is where it stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.contracts.preference import LogProbs
from jlora.preference.dpo import dpo
from jlora.preference.ipo import ipo

C, R, C0, R0 = np.random.default_rng(0).normal(size=(4, 6)).astype("f4") * 3
ONE = jnp.ones(6)
BASE = LogProbs(jnp.asarray(C0), jnp.asarray(R0), ONE, ONE)


def test_value_by_numpy():
    policy = LogProbs(jnp.asarray(C), jnp.asarray(R), ONE, ONE)
    want = ((C - R) - (C0 - R0) - 1 / 0.4) ** 2
    np.testing.assert_allclose(ipo(policy, BASE, tau=0.2), want, rtol=1e-4, atol=1e-5)


def test_a_margin_beyond_the_aim_is_pulled_back_and_by_dpo_never():
    def slope(loss, margin):
        def total(c):
            return jnp.sum(loss(BASE._replace(chosen=c), BASE))

        return np.asarray(jax.grad(total)(BASE.chosen + margin))

    np.testing.assert_allclose(slope(lambda *x: ipo(*x, tau=0.25), 2.0), 0, atol=1e-5)
    assert (slope(lambda *x: ipo(*x, tau=0.25), 3.0) > 0).all()
    assert (slope(dpo, 3.0) < 0).all()


def test_refusal():
    with pytest.raises(ValueError, match=r"tau: got -1\.0, expected > 0"):
        ipo(BASE, BASE, tau=-1.0)
