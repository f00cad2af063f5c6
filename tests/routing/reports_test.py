"""Counts, load, balance and drop rate against numpy, with padding and with dropped choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.contracts.router import Routes
from jlora.routing import reports

RNG = np.random.default_rng(0)
IDS = jnp.asarray(np.stack([RNG.permutation(4)[:2] for _ in range(10)]).reshape(2, 5, 2), jnp.int32)
WEIGHTS = jnp.asarray(RNG.random((2, 5, 2)) * (RNG.random((2, 5, 2)) < 0.7), jnp.float32)
SOFT = jnp.asarray(RNG.dirichlet(np.ones(4), (2, 5)), jnp.float32)
MASK = jnp.asarray(RNG.random((2, 5)) < 0.7)


def check():
    for mask in (None, MASK):
        real = np.ones((2, 5), bool) if mask is None else np.asarray(mask)
        kept = (np.asarray(WEIGHTS) > 0) & real[..., None]
        count = np.bincount(np.asarray(IDS)[kept], minlength=4)
        soft = np.where(real[..., None], SOFT, np.nan)
        balance, load = reports.measure(jnp.asarray(soft), IDS, WEIGHTS, mask)
        np.testing.assert_allclose(load, count / count.sum(), rtol=1e-6)
        want = 4 * (count / count.sum()) @ np.asarray(SOFT, "f8")[real].mean(0)
        np.testing.assert_allclose(balance, want, rtol=1e-6)
        said = reports.report(Routes(IDS, WEIGHTS, balance, load), mask)
        np.testing.assert_array_equal(said["counts"], count)
        np.testing.assert_allclose(said["dropped"], 1 - count.sum() / (2 * real.sum()), rtol=1e-6)


def test_against_numpy():
    check()


def test_nothing_of_no_tokens_and_no_gradient_of_padding():
    none = jnp.zeros_like(MASK)
    balance, load = reports.measure(SOFT, IDS, WEIGHTS, none)
    said = reports.report(Routes(IDS, WEIGHTS, balance, load), none)
    assert not any(np.any(t) for t in said.values())
    grad = jax.grad(lambda t: reports.measure(t, IDS, WEIGHTS, MASK)[0])(SOFT)
    assert not np.any(grad[~MASK]) and np.any(grad[MASK])


def test_chosen_scores():
    want = np.take_along_axis(np.asarray(SOFT), np.asarray(IDS), axis=-1)
    np.testing.assert_array_equal(reports.chosen(SOFT, IDS), want)


def test_mutation_counting_dropped_choices_is_seen(monkeypatch):
    good = reports.counts
    monkeypatch.setattr(reports, "counts", lambda i, w, *a: good(i, w + 1, *a))
    with pytest.raises(AssertionError):
        check()
