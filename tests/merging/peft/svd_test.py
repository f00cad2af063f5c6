"""PEFT's merges of dW: values by dense numpy with a full SVD, limits, a mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.peft import svd as module
from jlora.merging.peft.svd import (
    peft_dare_linear_svd,
    peft_dare_ties_svd,
    peft_magnitude_prune_svd,
    peft_svd,
    peft_svd_error,
    peft_ties_svd,
)

RNG = np.random.default_rng(0)
N, D_IN, D_OUT, R = 3, 18, 14, 3
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(N, D_IN, R)), jnp.float32),
    jnp.asarray(RNG.normal(size=(N, R, D_OUT)), jnp.float32),
)
DENSE = np.einsum("nir,nro->nio", *(np.asarray(t, float) for t in BANK))
W = np.array([0.5, -0.7, 0.4])
WJ = jnp.asarray(W, jnp.float32)
KEYS = jax.random.split(jax.random.key(0), N)
MASKS = RNG.random((N, D_IN, D_OUT)) < 0.5


def prune(density):
    out = np.zeros_like(DENSE)
    for n in range(N):
        order = np.argsort(-np.abs(DENSE[n]).ravel())[: int(density * DENSE[n].size)]
        out[n].ravel()[order] = DENSE[n].ravel()[order]
    return out


def disjoint(x, vote="total"):
    tally = (x if vote == "total" else np.sign(x)).sum(0)
    agree = np.sign(x) == np.where(tally >= 0, 1, -1)
    return (W[:, None, None] * x * agree).sum(0) / np.maximum(agree.sum(0), 1)


def check(method, expected, rank=R, **options):
    """The product is the best of its rank; the columns of u are orthonormal, as PEFT's."""
    low = jax.jit(lambda b: method(b, WJ, rank=rank, **options))(BANK)
    u, s, v = np.linalg.svd(expected)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(low.u @ low.v, best, rtol=1e-2, atol=1e-2)
    assert low.u.shape == (D_IN, rank)


def test_svd():
    exact = np.einsum("n,nio->io", W, DENSE)
    check(peft_svd, exact)
    s = np.linalg.svd(exact, compute_uv=False)
    np.testing.assert_allclose(peft_svd_error(BANK, WJ), np.sqrt((s[R:] ** 2).sum()), rtol=1e-4)


def test_magnitude_prune():
    check(peft_magnitude_prune_svd, np.einsum("n,nio->io", W, prune(0.3)), density=0.3)


@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_ties(vote):
    check(peft_ties_svd, disjoint(prune(0.6), vote), density=0.6, vote=vote)


def test_dare():
    options = {"keys": KEYS, "density": 0.5, "masks": jnp.asarray(MASKS, jnp.float32)}
    x = DENSE * MASKS / 0.5
    check(peft_dare_linear_svd, np.einsum("n,nio->io", W, x), **options)
    check(peft_dare_ties_svd, disjoint(x), **options)


def test_dare_draws_from_keys():
    run = jax.jit(lambda k: peft_dare_linear_svd(BANK, WJ, keys=k, density=0.5))
    one, other = run(KEYS), run(KEYS[::-1])
    assert float(jnp.abs(one.u @ one.v - other.u @ other.v).max()) > 0.1


def test_default_rank_is_that_of_the_adapters():
    assert jax.eval_shape(lambda b: peft_ties_svd(b, WJ), BANK).u.shape == (D_IN, R)


def test_density_one_is_the_truncated_sum():
    check(peft_magnitude_prune_svd, np.einsum("n,nio->io", W, DENSE), density=1.0)


def test_mutation_weighted_vote(monkeypatch):
    monkeypatch.setattr(
        module, "_disjoint", lambda x, w, vote: jnp.sum(x * w[:, None, None], axis=0)
    )
    with pytest.raises(AssertionError):
        check(peft_ties_svd, disjoint(prune(0.6)), density=0.6)
