"""Selection by counting: the exact top-k of streamed deltas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.merging.engine import threshold

D_IN, D_OUT = 33, 21
SIZE = D_IN * D_OUT


def whole(rng, *shape):
    """Few-bit numbers: all products and sums are exact, in any order."""
    return np.round(rng.normal(size=shape) * 64) / 64


def make(kind, n=3, r=3):
    rng = np.random.default_rng(3)
    u, v = whole(rng, n, D_IN, r), whole(rng, n, r, D_OUT)
    if kind == "outlier":  # a sample of elements says little about the largest
        u[:, 4] *= 2.0**12
    if kind == "sparse":  # mostly exact zeros
        u[:, 3:] = 0
    if kind == "flat":  # one magnitude
        u, v = np.sign(u) + (u == 0), np.sign(v) + (v == 0)
        u, v = u[..., :1], v[:, :1]
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


def check(kind, ks, block):
    bank = make(kind)
    find = jax.jit(lambda bank, k: threshold.kth_largest(bank, jnp.abs, k, block=block))
    size = np.abs(np.einsum("nir,nro->nio", *map(np.asarray, bank))).reshape(3, -1)
    ordered = -np.sort(-size, axis=1)
    for k in ks:
        t = np.asarray(find(bank, jnp.full(3, k, jnp.int32)))
        expected = ordered[:, k - 1]  # ties are kept together
        np.testing.assert_array_equal(size >= t[:, None], size >= expected[:, None])


@pytest.mark.parametrize("kind", ["plain", "outlier", "sparse", "flat"])
def test_against_sorting(kind):
    check(kind, [1, 2, 5, 20, 140, 400, SIZE - 1, SIZE], None)


def test_any_block_and_other_k():
    bank = make("plain")
    k = jnp.asarray([7, 100, 600], jnp.int32)
    size = np.abs(np.einsum("nir,nro->nio", *map(np.asarray, bank))).reshape(3, -1)
    for block in (5, 33):
        t = jax.jit(lambda b, n=block: threshold.kth_largest(b, jnp.abs, k, block=n))(bank)
        np.testing.assert_array_equal((size >= np.asarray(t)[:, None]).sum(1) >= k, True)
        np.testing.assert_array_equal((size > np.asarray(t)[:, None]).sum(1) <= k, True)


def test_large():
    """About four passes: the sample brackets the threshold."""
    rng = np.random.default_rng(0)
    bank = LowRank(
        jnp.asarray(rng.normal(size=(2, 300, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 4, 400)), jnp.float32),
    )
    t = threshold.kth_largest(bank, jnp.abs, jnp.asarray([24000, 12], jnp.int32))
    size = np.abs(np.asarray(bank.u @ bank.v))
    assert abs(int((size[0] >= t[0]).sum()) - 24000) <= 1  # an ulp of another product order
    assert abs(int((size[1] >= t[1]).sum()) - 12) <= 1


def test_the_sample_brackets_the_threshold_closely():
    """What makes four passes enough: ascending guesses around it, few elements between them."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(3, 300, 4)), rng.normal(size=(3, 4, 400))
    bank = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))
    size, k = np.sort(np.abs(u @ v).reshape(3, -1)), np.array([96000, 24000, 6000])
    guesses = np.asarray(threshold._sampled(bank, jnp.abs, jnp.asarray(k, jnp.int32)))
    assert guesses.shape == (3, threshold.WAYS) and (np.diff(guesses) >= 0).all()
    for n in range(3):
        low, high = np.searchsorted(size[n], guesses[n, [0, -1]])
        assert low < 120000 - k[n] < high
        assert 0.05 < (high - low) / 120000 < 0.15


def test_other_statistics():
    bank = make("plain")
    t = threshold.kth_largest(bank, lambda d: jnp.max(d, axis=0, keepdims=True) ** 2,
                              jnp.asarray([30], jnp.int32))  # fmt: skip
    x = np.einsum("nir,nro->nio", *map(np.asarray, bank)).max(0) ** 2
    assert (x >= t[0]).sum() >= 30 >= (x > t[0]).sum()


def test_mutation_a_wrong_count_is_seen(monkeypatch):
    real = threshold.fold
    monkeypatch.setattr(
        threshold, "fold", lambda bank, step, init, block: real(bank, step, init, block) + 1
    )
    with pytest.raises(AssertionError):
        check("plain", [20], None)


def test_kept():
    np.testing.assert_array_equal(threshold.kept(0.25, 2, 10), [2, 2])
    np.testing.assert_array_equal(threshold.kept((0.5, 1.0), 2, 10), [5, 10])
    np.testing.assert_array_equal(jax.jit(lambda p: threshold.kept(p, 2, 8))(0.25), [2, 2])
    np.testing.assert_array_equal(jax.jit(lambda p: threshold.kept(p, 2, 9))(0.3), [2, 2])  # 2.7
    assert threshold.is_one(1.0) and threshold.is_one((1.0, 1.0)) and not threshold.is_one(0.5)
    assert not threshold.is_one(jnp.asarray(1.0))


@pytest.mark.parametrize("bad", [0.0, 1.5, -1.0, float("nan"), 0.01, (0.5,), (0.5, 0.0)])
def test_bad_density(bad):
    with pytest.raises(ValueError, match="density: got"):
        threshold.kept(bad, 2, 10)
