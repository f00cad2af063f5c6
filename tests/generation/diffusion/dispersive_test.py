"""Dispersive losses against loops in numpy, their floor, invariances, masks and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.diffusion import dispersive
from jlora.generation.diffusion.dispersive import dispersive_loss

Z = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
GROUPS = np.asarray([0, 0, 1, 2, 1], np.int32)
RANK = jax.jit(dispersive.effective_rank)
TAU, MARGIN = 0.7, 1.5


def oracle(name, z, keep, divide=True):
    """The formulas, pair by pair, in float64."""
    z = z.reshape(len(z), -1).astype(np.float64)
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i == j or keep(i, j)]
    size = z.shape[1] if divide else 1
    far = [np.sum((z[i] - z[j]) ** 2) / size for i, j in pairs]
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    if name == "infonce_l2":
        return np.log(np.mean(np.exp(-np.asarray(far) / TAU)))
    if name == "infonce_cos":
        return np.log(np.mean([np.exp(unit[i] @ unit[j] / TAU) for i, j in pairs]))
    if name == "hinge":
        return np.mean([max(0.0, MARGIN - d) ** 2 for d in far])
    covariance = np.cov(unit.T)
    return np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)


KEEP = {
    "all": lambda i, j: True,
    "other_condition": lambda i, j: GROUPS[i] != GROUPS[j],
    "same_condition": lambda i, j: GROUPS[i] == GROUPS[j],
}


@partial(jax.jit, static_argnames=("name", "mask"))
def compute(name, z=Z, mask="all"):
    return dispersive_loss(
        name, jnp.asarray(z), jnp.asarray(GROUPS), mask=mask, temperature=TAU, margin=MARGIN
    )


@pytest.mark.parametrize("mask", dispersive.MASKS)
@pytest.mark.parametrize("name", ["infonce_l2", "infonce_cos", "hinge"])
def test_pairwise_losses_are_their_formulas(name, mask):
    np.testing.assert_allclose(compute(name, mask=mask), oracle(name, Z, KEEP[mask]), rtol=1e-5)


def test_covariance_and_none():
    np.testing.assert_allclose(
        compute("covariance"), oracle("covariance", Z, KEEP["all"]), rtol=1e-4
    )
    assert compute("none") == 0.0


def test_the_oracle_sees_a_missing_division_by_the_dimension():
    wrong = oracle("infonce_l2", Z, KEEP["all"], divide=False)
    assert abs(compute("infonce_l2") - wrong) > 0.1


def test_floor_ceiling_and_shift():
    far = 1e3 * np.arange(5, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    np.testing.assert_allclose(compute("infonce_l2", far), -np.log(5), rtol=1e-6)
    same = np.ones((5, 4), np.float32)
    np.testing.assert_allclose(compute("infonce_l2", same), 0.0, atol=1e-6)
    np.testing.assert_allclose(compute("infonce_l2", Z + 300.0), compute("infonce_l2"), rtol=1e-3)
    np.testing.assert_allclose(compute("hinge", far), MARGIN**2 / 5, rtol=1e-6)
    np.testing.assert_allclose(compute("infonce_cos", 7.0 * Z), compute("infonce_cos"), rtol=1e-5)
    assert abs(compute("infonce_l2", 7.0 * Z) - compute("infonce_l2")) > 0.1


@pytest.mark.parametrize("name", ["infonce_l2", "infonce_cos", "hinge", "covariance"])
def test_gradients_are_finite_and_repel(name):
    grad = jax.jit(jax.grad(lambda z: compute(name, z)))
    assert np.all(np.isfinite(grad(jnp.ones((5, 6)))))
    assert np.all(np.isfinite(grad(jnp.zeros((5, 6)))))
    z = jnp.asarray(1.0 + 0.3 * Z.reshape(5, -1))
    step = z - 0.1 * grad(z)
    assert compute(name, step) < compute(name, z)
    if name in ("infonce_l2", "hinge"):  # the sum of squared distances is B times the spread
        assert np.var(step, axis=0).sum() > np.var(z, axis=0).sum()


def test_masks_choose_who_repels_whom():
    grad = jax.jit(jax.grad(lambda z, mask: compute("infonce_l2", z, mask)), static_argnums=1)
    z = jnp.asarray(Z.reshape(5, -1))
    alone = np.asarray(grad(z, "same_condition"))[3]  # the only one of its condition
    np.testing.assert_allclose(alone, 0.0, atol=1e-6)
    assert np.abs(grad(z, "other_condition")[3]).max() > 1e-3


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(3)
    line = rng.standard_normal((9, 1)) @ rng.standard_normal((1, 6))
    rank = RANK(jnp.asarray(line + 5.0, jnp.float32))
    np.testing.assert_allclose(rank, 1.0, rtol=1e-3)
    cross = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)  # equal variances, mean 0
    np.testing.assert_allclose(RANK(jnp.asarray(cross)), 4.0, rtol=1e-4)
    spectrum = np.linalg.svd(Z.reshape(5, -1) - Z.reshape(5, -1).mean(0), compute_uv=False) ** 2
    share = spectrum[:4] / spectrum.sum()
    expected = np.exp(-np.sum(share * np.log(share)))
    np.testing.assert_allclose(RANK(jnp.asarray(Z)), expected, rtol=1e-4)


def test_bad_names_are_errors():
    z = jnp.asarray(Z)
    with pytest.raises(ValueError, match=r"'l2'.*'infonce_l2'"):
        dispersive_loss("l2", z)
    with pytest.raises(ValueError, match="'some'"):
        dispersive_loss("hinge", z, mask="some")
    with pytest.raises(ValueError, match="got no groups"):
        dispersive_loss("hinge", z, mask="same_condition")
    with pytest.raises(ValueError, match=r"covariance.*'same_condition'"):
        dispersive_loss("covariance", z, jnp.asarray(GROUPS), mask="same_condition")
