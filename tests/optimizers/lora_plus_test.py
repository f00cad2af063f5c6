"""LoRA+: one step by numpy, two learning rates in one, and the speed it is for."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.optimizers import lora_plus

GOOD = lora_plus
D, R = 256, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(64, D)), jnp.float32)
Y = X @ jnp.asarray(RNG.normal(size=(D, 2)) @ RNG.normal(size=(2, D)) / np.sqrt(D), jnp.float32)


@pytest.fixture(autouse=True)
def loose():
    """optax counts steps in int32 and divides by powers of them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def linear(p, x):
    return x @ p["w"]


def adapter():
    w = {"w": jnp.zeros((D, D))}
    return w, jl.init(jax.random.key(0), linear, w, X, methods={"w": jl.LoRA(R, alpha=float(R))})


def trained(optimizer, steps):
    """(trainables, loss) after some steps on a map of rank two."""
    params, a = adapter()

    def loss(t):
        return jnp.mean((jl.lift(linear)(params, a.replace(trainable=t), X) - Y) ** 2)

    def step(carry, _):
        t, state = carry
        updates, state = optimizer.update(jax.grad(loss)(t), state, t)
        return (optax.apply_updates(t, updates), state), None

    @jax.jit
    def run(t):
        (t, _), _ = jax.lax.scan(step, (t, optimizer.init(t)), None, length=steps)
        return t, loss(t)

    return run(a.trainable)


def check_value():
    grads = {"up": {"a": jnp.ones((3, 2)), "b": jnp.full((2, 3), 2.0)}, "down": {"b": jnp.ones(2)}}
    chained = optax.chain(optax.sgd(0.1), lora_plus(4.0))
    updates, _ = chained.update(grads, chained.init(grads))
    np.testing.assert_allclose(updates["up"]["a"], np.full((3, 2), -0.1), rtol=1e-6)
    np.testing.assert_allclose(updates["up"]["b"], np.full((2, 3), -0.8), rtol=1e-6)
    np.testing.assert_allclose(updates["down"]["b"], np.full(2, -0.4), rtol=1e-6)


def test_value():
    check_value()


def test_it_is_two_learning_rates_weight_decay_included():
    labels = {"w": {"a": "a", "b": "b"}}
    rates = {"a": optax.adamw(1e-3, weight_decay=0.1), "b": optax.adamw(8e-3, weight_decay=0.1)}
    both, _ = trained(optax.partition(rates, labels), 5)
    ours, _ = trained(optax.chain(optax.adamw(1e-3, weight_decay=0.1), lora_plus(8.0)), 5)
    chex.assert_trees_all_close(ours, both, rtol=1e-5, atol=1e-7)


def test_limit_ratio_one_changes_nothing():
    plain, _ = trained(optax.adam(1e-3), 3)
    ours, _ = trained(optax.chain(optax.adam(1e-3), lora_plus(1.0)), 3)
    chex.assert_trees_all_equal(ours, plain)


def test_claim_at_the_rate_of_a_it_needs_less_than_half_the_steps():
    _, start = trained(optax.adam(1e-3), 0)
    _, plain = trained(optax.adam(1e-3), 60)
    _, ours = trained(optax.chain(optax.adam(1e-3), lora_plus(16.0)), 30)
    assert ours < plain < start


def test_other_names_and_refusals():
    tree = {"w": {"b1": jnp.ones(2), "a1": jnp.ones(2)}}
    updates, _ = lora_plus(3.0, ("b1", "b2")).update(tree, optax.EmptyState())
    assert updates["w"]["b1"][0] == 3 and updates["w"]["a1"][0] == 1
    with pytest.raises(ValueError, match=r"names: got \['b'\], expected some of \['a1', 'b1'\]"):
        lora_plus().init(tree)
    with pytest.raises(ValueError, match="ratio: got 0, expected a positive number"):
        lora_plus(0)


def test_mutation_the_wrong_factor_is_seen(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "lora_plus", lambda ratio: GOOD(ratio, ("a",)))
    with pytest.raises(AssertionError):
        check_value()
