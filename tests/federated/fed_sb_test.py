"""Fed-SB: bases by dense SVD, exact averages of cores, gradients through the bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.federated.fed_sb import bases, fed_sb


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def test_fed_sb_bases_cores_and_average():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(7, 6)).astype("f4")
    left, core, right = bases(jnp.asarray(g), 3, eta=0.1)
    step = -0.1 * np.sign(g)
    s = np.linalg.svd(step, compute_uv=False)
    best = np.asarray(left @ core @ right)
    np.testing.assert_allclose(np.linalg.norm(step - best), np.sqrt((s[3:] ** 2).sum()), rtol=1e-4)
    cores, p = rng.normal(size=(4, 3, 3)).astype("f4"), np.asarray([0.1, 0.2, 0.3, 0.4], "f4")
    got = fed_sb(left, jnp.asarray(cores), right, p)
    truth = np.einsum("n,ir,nrs,so->io", p, left, cores, right)
    np.testing.assert_allclose(dense(got), truth, atol=1e-5)
    # the gradient of the core is the full gradient seen through both bases
    full = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    seen = jax.grad(lambda c: jnp.sum(full * (left @ c @ right)))(core)
    through = left @ (left.T @ full @ right.T) @ right
    np.testing.assert_allclose(left @ seen @ right, through, atol=1e-5)


def test_limits_full_rank_is_the_step_and_one_client_is_itself():
    g = jnp.asarray(np.random.default_rng(1).normal(size=(7, 6)), jnp.float32)
    left, core, right = bases(g, 6)
    np.testing.assert_allclose(left @ core @ right, -np.sign(g), atol=1e-5)
    one = fed_sb(left, core[None], right, jnp.ones(1))
    np.testing.assert_allclose(dense(one), -np.sign(g), atol=1e-5)


def test_fed_sb_refuses_a_rank_beyond_the_matrix():
    with pytest.raises(ValueError, match=r"rank: got 7, expected in 1..6"):
        bases(jnp.ones((8, 6)), 7)


def test_clients_with_bases_of_their_own_have_no_exact_average_and_with_shared_ones_they_have():
    rng = np.random.default_rng(0)
    lefts, cores, rights = (
        rng.normal(size=s).astype("f4") for s in ((3, 7, 2), (3, 2, 2), (3, 2, 6))
    )

    def far(lefts, rights):
        """How far `fed_sb` with the mean of the bases is from the average of the products."""
        truth = np.einsum("nir,nrs,nso->io", lefts, cores, rights) / 3
        mean = jnp.asarray(lefts.mean(0)), jnp.asarray(cores), jnp.asarray(rights.mean(0))
        return np.abs(dense(fed_sb(*mean, np.full(3, 1 / 3))) - truth).max()

    assert far(lefts, rights) > 0.1
    assert far(lefts[[0, 0, 0]], rights[[0, 0, 0]]) < 1e-5
