"""Losses of routers against numpy, at their landmarks, and which way the entropy's sign pushes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import losses, reports

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
MASK = jnp.asarray(np.random.default_rng(1).random((2, 5)) < 0.7)


def check():
    for mask in (None, MASK):
        real = np.ones((2, 5), bool) if mask is None else np.asarray(mask)
        given = jnp.where(jnp.asarray(real)[..., None], LOGITS, LOGITS if mask is None else jnp.nan)
        logits = np.asarray(LOGITS, np.float64)[real]
        total = np.log(np.exp(logits).sum(-1))
        soft = np.exp(logits - total[:, None])
        np.testing.assert_allclose(losses.z_loss(given, mask), np.mean(total**2), rtol=1e-5)
        want = -np.mean((soft * np.log(soft)).sum(-1))
        np.testing.assert_allclose(losses.entropy(given, mask), want, rtol=1e-5)
        for loss in (losses.z_loss, losses.entropy):
            grad = jax.grad(loss)(given, mask)
            assert np.all(np.isfinite(grad)) and np.any(grad) and not np.any(grad[~real])


def test_against_numpy():
    check()


def test_landmarks_of_the_entropy():
    np.testing.assert_allclose(losses.entropy(jnp.zeros((3, 4))), np.log(4), rtol=1e-6)
    assert losses.entropy(100 * jnp.eye(4)) < 1e-6
    padded = jnp.concatenate([LOGITS, jnp.full((2, 5, 2), -jnp.inf)], axis=-1)
    np.testing.assert_allclose(losses.entropy(padded), losses.entropy(LOGITS), rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(losses.entropy)(padded)))


@pytest.mark.parametrize("sign", [-1, 1])
def test_specialisation_of_an_even_router(sign):
    """a / E + sign lambda log E."""
    even = jnp.zeros((4, 4))
    soft, ids = jax.nn.softmax(even), jnp.arange(4, dtype=jnp.int32)[:, None]
    balance, _ = reports.measure(soft, ids, jnp.ones((4, 1)))
    got = losses.specialisation(balance, losses.entropy(even), 4, 2.0, 0.3, sign)
    np.testing.assert_allclose(got, 2 / 4 + sign * 0.3 * np.log(4), rtol=1e-6)


@pytest.mark.parametrize(("sign", "sharper"), [(-1, False), (1, True)])
def test_the_printed_sign_spreads_and_the_other_decides(sign, sharper):
    def loss(t):
        return losses.specialisation(jnp.ones(()), losses.entropy(t), 4, sign=sign)

    moved = LOGITS - 5.0 * jax.grad(loss)(LOGITS)
    assert (losses.entropy(moved) < losses.entropy(LOGITS)) == sharper


def test_refusals():
    one = jnp.ones(())
    with pytest.raises(ValueError, match="sign: got 0, expected -1 or 1"):
        losses.specialisation(one, one, 4, sign=0)
    with pytest.raises(ValueError, match=r"entropy_weight: got -0\.1, expected 0 or more"):
        losses.specialisation(one, one, 4, entropy_weight=-0.1)


def test_mutation_padding_that_counts_is_seen(monkeypatch):
    monkeypatch.setattr(losses, "_mean", lambda values, mask: jnp.mean(values))
    with pytest.raises(AssertionError):
        check()
