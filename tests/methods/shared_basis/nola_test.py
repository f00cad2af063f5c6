"""NOLA: mixtures against bases that are drawn one group after the other, and never stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from jlora.methods import NOLA
from jlora.methods.shared_basis import nola

METHOD = NOLA(rank=3, alpha=6.0, bases=11)


def stored(seed, shape, count=11):
    """The bases of a seed [count, n, m]: groups of 8, each of the words of a key of its own."""
    key, size = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32"), 8 * np.prod(shape)
    groups = []
    for n in range(2):
        own = jax.random.key_data(jax.random.fold_in(key, n))
        words = np.asarray(threefry_2x32(own, jnp.arange((size + 1) // 2, dtype=jnp.uint32)))
        halves = np.concatenate([words // 65536, words % 65536])[:size]
        groups.append(((halves + 0.5) / 32768 - 1).reshape(8, *shape))
    return np.concatenate(groups)[:count] / count**0.5


def check_value(bench):
    adapter = bench.noisy(METHOD)
    p, seed = bench.numbers(adapter), np.asarray(adapter.frozen["w"]["seed"])
    a = p["a0"] + np.tensordot(p["alpha"], stored(seed[0], (12, 3)), 1)
    b = np.tensordot(p["beta"], stored(seed[1], (3, 8)), 1)
    bench.agree(adapter, bench.w + 2.0 * a @ b, 5e-5)


def test_value(bench):
    check_value(bench)


def test_gradients_are_inner_products_with_the_bases():
    seed, rng = np.asarray([3, 4], np.uint32), np.random.default_rng(0)
    weights, g = rng.normal(size=11), rng.normal(size=(5, 2))
    loss = lambda c: jnp.sum(nola.mixture(c, jnp.asarray(seed), (5, 2)) * jnp.asarray(g, "f4"))  # noqa: E731
    found = jax.grad(loss)(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, np.tensordot(stored(seed, (5, 2)), g, 2), rtol=1e-4)


def test_numbers_do_not_depend_on_rank_or_size_and_draws_differ(bench):
    adapter = bench.fresh(METHOD)
    assert {k: v.shape for k, v in adapter.trainable["w"].items()} == {"alpha": (11,),
                                                                       "beta": (11,)}  # fmt: skip
    seed = np.asarray(adapter.frozen["w"]["seed"])
    draws = stored(seed[0], (12, 3))
    assert len(np.unique(draws)) > 0.97 * draws.size and np.abs(draws).max() < 11**-0.5
    np.testing.assert_allclose(np.cov(draws.reshape(11, -1)), np.eye(11) / 33, atol=0.02)
    assert (seed[0] != seed[1]).any()
    again = bench.fresh(METHOD, seed=1).frozen["w"]["seed"]
    assert (np.asarray(again) != seed).all()


def test_a_compiled_step_holds_a_few_bases_at_a_time():
    """512 bases of 64 x 4 would be 512 kB; temporary memory is an eighth of it at most."""
    seed = jnp.zeros(2, jnp.uint32)
    step = jax.jit(jax.grad(lambda c: jnp.sum(nola.mixture(c, seed, (64, 4)) ** 2)))
    memory = step.lower(jnp.ones(512)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64_000


def test_refusals():
    for name in ("rank", "bases"):
        with pytest.raises(ValueError, match=rf"NOLA\.{name}: got 0, expected an integer"):
            NOLA(**{name: 0})


def test_mutation_one_family_for_both_factors_is_seen(bench, monkeypatch):
    good = NOLA.factors
    same = lambda self, p: good(self, p | {"seed": p["seed"][::-1]})  # noqa: E731
    monkeypatch.setattr(NOLA, "factors", same)
    with pytest.raises(AssertionError):
        check_value(bench)
