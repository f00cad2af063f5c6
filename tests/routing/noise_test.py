"""Noise: the draw, that it is one of training alone, that each batch has its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.routing import noise
from jlora.routing.noise import Noisy
from jlora.routing.router import TopK

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)


def check():
    rule = Noisy(TopK(2), 0.7, seed=3)
    state = rule.init_state(4)
    for n in range(2):
        routes, after = rule(LOGITS, state, True, None)
        key = jax.random.fold_in(jax.random.key(3), n)
        draw = np.asarray(LOGITS, "f8") + 0.7 * np.asarray(jax.random.normal(key, (9, 4)), "f8")
        np.testing.assert_array_equal(routes.ids, np.argsort(-draw, axis=-1)[:, :2])
        assert after["draws"] == n + 1
        state = after
    return state


def test_the_draw_is_that_of_the_batch():
    check()


def test_there_is_none_outside_of_training_and_none_of_scale_0():
    want = TopK(2).routes(LOGITS, {}, True)
    for rule, train in ((Noisy(TopK(2)), False), (Noisy(TopK(2), 0.0), True)):
        got = rule.routes(LOGITS, rule.init_state(4), train)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_deviation_per_token_and_expert():
    scale = jnp.asarray(np.random.default_rng(1).random((9, 4)), jnp.float32)
    got = noise.noisy(jax.random.key(0), LOGITS, scale)
    draw = np.asarray(jax.random.normal(jax.random.key(0), (9, 4)))
    np.testing.assert_allclose(got, np.asarray(LOGITS) + draw * np.asarray(scale), rtol=1e-6)


def test_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match=r"Noisy\.scale: got -1"):
        Noisy(TopK(2), -1)


def test_mutation_another_scale_is_seen(monkeypatch):
    good = noise.noisy
    monkeypatch.setattr(noise, "noisy", lambda k, t, s: good(k, t, 4 * s))
    with pytest.raises(AssertionError):
        check()
