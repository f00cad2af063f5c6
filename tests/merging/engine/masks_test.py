"""Masks: the same under any blocking and sharding, right rates, independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.algebra import LowRank
from jlora.merging.elementwise.dare import dare_linear_rule, dare_ties_rule
from jlora.merging.elementwise.della import della_rule
from jlora.merging.engine import masks, streamed

KEYS = jax.random.split(jax.random.key(3), 2)


def bits(numbers, columns=31, keys=KEYS):
    run = jax.jit(masks.words, static_argnums=2)
    return np.asarray(run(keys, jnp.asarray(numbers, jnp.int32), columns))


def check_blocking():
    whole = bits(range(12))
    for blocks in ([range(6), range(6, 12)], [[k] for k in range(12)]):
        joined = np.concatenate([bits(list(b)) for b in blocks], axis=1)
        np.testing.assert_array_equal(joined, whole)


def test_any_blocking_gives_the_same_bits():
    check_blocking()


def test_mutation_a_key_for_each_block_is_seen(monkeypatch):
    def per_block(keys, numbers, columns):
        shape = (len(numbers), columns)
        return jax.vmap(
            lambda k: jax.random.bits(jax.random.fold_in(k, numbers[0]), shape, jnp.uint16)
        )(keys)

    monkeypatch.setattr(masks, "words", per_block)
    with pytest.raises(AssertionError):
        check_blocking()


def test_the_order_of_adapters_and_the_number_of_columns_do_not_matter():
    np.testing.assert_array_equal(bits([3, 4], keys=KEYS[::-1])[::-1], bits([3, 4]))
    assert bits([0], 8).shape == (2, 1, 8) and bits([0], 1).shape == (2, 1, 1)


def test_bits_are_uniform_and_independent():
    x = bits(range(300), 64) / 65536.0
    n = x[0].size
    assert abs(x.mean() - 0.5) < 5 * 0.29 / np.sqrt(2 * n)
    flat = np.stack([x[0].ravel(), x[1].ravel(), np.roll(x[0], 1, 0).ravel(),
                     np.roll(x[0], 1, 1).ravel()])  # fmt: skip
    off = np.corrcoef(flat) - np.eye(4)
    assert np.abs(off).max() < 5 / np.sqrt(n)
    pairs = np.corrcoef(x[0][:, ::2].ravel(), x[0][:, 1::2].ravel())[0, 1]  # of one word
    assert abs(pairs) < 5 / np.sqrt(n / 2)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rate_and_mean(p):
    d = jnp.ones((2, 400, 50))
    kept = np.asarray(masks.dropped(d, jnp.full((2, 1, 1), p), KEYS, jnp.arange(400)))
    np.testing.assert_allclose(kept.mean(), 1.0, atol=5 * np.sqrt((1 / p - 1) / kept.size))
    np.testing.assert_allclose(kept.max(), 1 / p, rtol=1e-3)
    plain = masks.dropped(d, jnp.full((2, 1, 1), p), KEYS, jnp.arange(400), rescale=False)
    np.testing.assert_array_equal(np.asarray(plain), kept > 0)


def test_probabilities_are_rounded_and_never_zero():
    got = masks.steps(jnp.asarray([0.3, 0.7, 1e-9, 1.0, 1.5]))  # 19660.8, 45875.2 of 65536
    np.testing.assert_array_equal(got, [19661, 45875, 1, 65536, 65536])


def test_keep_all():
    d = jnp.ones((2, 40, 50))
    np.testing.assert_array_equal(masks.dropped(d, jnp.ones((2, 1, 1)), KEYS, jnp.arange(40)), d)


def make(d_in=24, d_out=16):
    rng = np.random.default_rng(0)
    return LowRank(
        jnp.asarray(rng.normal(size=(2, d_in, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 3, d_out)), jnp.float32),
    )


def test_a_merge_is_the_same_for_any_block():
    bank, w = make(), jnp.asarray([0.6, 0.4])
    rule = dare_linear_rule(bank, w, keys=KEYS, density=0.4)
    whole = np.asarray(streamed.dense(bank, rule, block=24))
    for block in (1, 7):
        got = np.asarray(streamed.dense(bank, rule, block=block))
        np.testing.assert_array_equal(got == 0, whole == 0)
        np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [dare_ties_rule, della_rule])
def test_a_merge_is_the_same_under_any_sharding(method):
    bank, w = make(), jnp.asarray([0.6, 0.4])

    @jax.jit
    def run(bank, keys):
        return streamed.dense(bank, method(bank, w, keys=keys, density=0.5))

    one = run(bank, KEYS)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    for u, v in (("x", "y"), (None, ("x", "y"))):
        put = [NamedSharding(mesh, PartitionSpec(*s)) for s in ((None, u, None), (None, None, v))]
        many = run(LowRank(*map(jax.device_put, bank, put)), KEYS)
        np.testing.assert_array_equal(np.asarray(many) == 0, np.asarray(one) == 0)
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
