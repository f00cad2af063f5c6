"""PEFT's factor-space merges: values by numpy, known faults, limits, a mutation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.peft import factors as peft_factor
from jlora.merging.peft.factors import (
    peft_cat,
    peft_dare_linear,
    peft_dare_ties,
    peft_linear,
    peft_magnitude_prune,
    peft_ties,
)

RNG = np.random.default_rng(0)
BANK = LowRank(
    jnp.asarray(RNG.normal(size=(3, 8, 4)), jnp.float32),
    jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32),
)
W, S = np.array([0.5, -0.7, 0.4]), np.array([2.0, 0.5, 1.0])
WJ, SJ = jnp.asarray(W, jnp.float32), jnp.asarray(S, jnp.float32)
ROOT = np.sqrt(np.abs(W * S))
ROOTS = (jnp.asarray(ROOT * np.sign(W), jnp.float32), jnp.asarray(ROOT, jnp.float32))
MASKS = LowRank(*(jnp.asarray(RNG.random(t.shape) < 0.5, jnp.float32) for t in BANK))


def prune(x, density):
    out = np.zeros_like(x)
    for n in range(len(x)):
        order = np.argsort(-np.abs(x[n]).ravel())[: int(density * x[n].size)]
        out[n].ravel()[order] = x[n].ravel()[order]
    return out


def summed(x, c, vote=None):
    y = c[:, None, None] * x
    if vote is None:
        return y.sum(0)
    tally = (x if vote == "total" else np.sign(x)).sum(0)
    agree = np.sign(x) == np.where(tally >= 0, 1, -1)
    return (y * agree).sum(0) / np.maximum(agree.sum(0), 1)


def check(got, prepare, vote=None):
    u, v = (np.asarray(t, float) for t in BANK)
    np.testing.assert_allclose(got.u, summed(prepare(u, 0), ROOT * np.sign(W), vote), rtol=1e-5,
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(got.v, summed(prepare(v, 1), ROOT, vote), rtol=1e-5, atol=1e-6)


def plain(x, side):
    return x


def dropped(x, side):
    return x * np.asarray(MASKS[side]) / 0.5


def test_linear():
    check(peft_linear(BANK, WJ, roots=ROOTS), plain)


def test_magnitude_prune():
    check(peft_magnitude_prune(BANK, WJ, density=0.3, roots=ROOTS), lambda x, _: prune(x, 0.3))


@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_ties(vote):
    got = peft_ties(BANK, WJ, density=0.6, vote=vote, roots=ROOTS)
    check(got, lambda x, _: prune(x, 0.6), vote)


def test_dare():
    check(peft_dare_linear(BANK, WJ, density=0.5, masks=MASKS, roots=ROOTS), dropped)
    check(peft_dare_ties(BANK, WJ, density=0.5, masks=MASKS, roots=ROOTS), dropped, "total")


def test_dare_draws_from_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    bank = LowRank(jnp.ones((3, 200, 4)), jnp.ones((3, 4, 200)))
    low = jax.jit(lambda k: peft_dare_linear(bank, jnp.ones(3), density=0.25, keys=k))(keys)
    for t in low:  # sums of three independent masks of rate 1/4, times 4
        assert abs(float(t.mean()) / 3 - 1) < 0.15
        np.testing.assert_allclose(float((t == 12).mean()), 1 / 64, atol=0.015)
    assert not np.array_equal(low.u, low.v.T)


def test_cat_is_exact():
    low = peft_cat(BANK, WJ, scales=SJ)
    u, v = (np.asarray(t, float) for t in BANK)
    np.testing.assert_allclose(low.u @ low.v, np.einsum("n,nir,nro->io", W * S, u, v), rtol=1e-4,
                               atol=1e-5)  # fmt: skip
    assert low.u.shape == (8, 12)


def test_roots_of_the_weights_alone():
    """What a bank with folded scales gets."""
    root = np.sqrt(np.abs(W))
    roots = (jnp.asarray(root * np.sign(W), jnp.float32), jnp.asarray(root, jnp.float32))
    for x, y in zip(peft_linear(BANK, WJ), peft_linear(BANK, WJ, roots=roots), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_density_one_is_linear():
    for method, options in ((peft_magnitude_prune, {}), (peft_dare_linear, {"keys": None})):
        low = method(BANK, WJ, density=1.0, **options)
        chex.assert_trees_all_equal(low, peft_linear(BANK, WJ))


def test_known_faults_are_reproduced():
    """With itself at 1/2 + 1/2 an adapter doubles; a negative sign goes to one side."""
    same = LowRank(*(jnp.stack([t[0], t[0]]) for t in BANK))
    one = np.asarray(BANK.u[0] @ BANK.v[0])
    low = peft_linear(same, jnp.full(2, 0.5))
    np.testing.assert_allclose(low.u @ low.v, 2 * one, rtol=1e-4, atol=1e-5)
    low = peft_linear(LowRank(BANK.u[:1], BANK.v[:1]), jnp.full(1, -1.0))
    np.testing.assert_allclose(low.u @ low.v, -one, rtol=1e-4, atol=1e-5)


def test_mutation_weights_without_the_root(monkeypatch):
    real = peft_factor.total
    monkeypatch.setattr(peft_factor, "total", lambda x, c: real(x, c * jnp.abs(c)))
    with pytest.raises(AssertionError):
        check(peft_linear(BANK, WJ, roots=ROOTS), plain)


def test_errors():
    with pytest.raises(ValueError, match="density: got"):
        peft_ties(BANK, WJ, density=0.0)
    with pytest.raises(ValueError, match="vote: got 'sum'"):
        peft_ties(BANK, WJ, vote="sum")
    with pytest.raises(ValueError, match="keys, masks: got neither"):
        peft_dare_linear(BANK, WJ)
