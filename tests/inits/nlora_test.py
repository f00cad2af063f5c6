"""NLoRA: rows, columns and their common block; Nyström's identity; what is trained."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.nlora")


def started(world, fn=jl.inits.nlora, **more):
    return fn(world.fn, world.params, world.batches, methods=world.methods, **more)


def check_value(world):
    adapter = started(world)
    world.unchanged(adapter)
    for path, w in world.weights.items():
        p = world.arrays(adapter, path)
        np.testing.assert_allclose(p["a"], w[..., :, :2], atol=1e-7)
        np.testing.assert_allclose(p["b"], w[..., :2, :], atol=1e-7)
        np.testing.assert_allclose(p["core"], w[..., :2, :2], atol=1e-7)


def test_value(world):
    check_value(world)


def test_mutation_the_last_columns_are_seen(world, monkeypatch):
    good = module.filled

    def turned(adapter, params, rule, **more):
        return good(adapter, params, lambda k, w, *rest, rank: rule(
            k, w[:, ::-1], *rest, rank=rank), **more)  # fmt: skip

    monkeypatch.setattr(module, "filled", turned)
    with pytest.raises(AssertionError):
        check_value(world)


def test_the_pseudo_inverse_gives_back_a_weight_of_rank_r(world):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(8, 2)) @ rng.normal(size=(2, 6)), jnp.float32)
    fn, methods = lambda p, x: x @ p["w"], {"w": jl.LoRA(rank=2, alpha=2.0)}
    args = (fn, {"w": w}, [world.batches[0]])
    p = world.arrays(jl.inits.nlora(*args, methods=methods, middle="pinv"), "w")
    np.testing.assert_allclose(p["a"] @ p["core"] @ p["b"], w, atol=1e-3)
    raw = world.arrays(jl.inits.nlora(*args, methods=methods), "w")
    assert np.abs(raw["a"] @ raw["core"] @ raw["b"] - np.asarray(w)).max() > 0.1


def test_without_a_residual_the_start_is_added(world):
    adapter = started(world, residual=False)
    w = world.weights["head"]
    want = w + 3 * w[:, :2] @ w[:2, :2] @ w[:2]
    np.testing.assert_allclose(
        np.asarray(jl.merge(world.params, adapter)["head"]).T, want, atol=1e-4
    )
    inner = started(world, jl.inits.int_tune, residual=False)
    merged = jl.merge(world.params, inner)["head"]
    np.testing.assert_allclose(np.asarray(merged).T, want, atol=1e-4)


def test_int_tune_trains_the_block_alone(world):
    adapter = started(world, jl.inits.int_tune)
    world.unchanged(adapter)
    assert adapter.size == 3 * 2 * 2
    p = world.arrays(adapter, "head")
    np.testing.assert_allclose(p["a"], world.weights["head"][:, :2], atol=1e-7)


def test_slora_starts_at_random_from_the_base(world):
    one = started(world, jl.inits.slora, key=jax.random.key(0))
    other = started(world, jl.inits.slora, key=jax.random.key(1))
    world.unchanged(one)
    assert np.abs(one.trainable["head"]["a"] - other.trainable["head"]["a"]).max() > 0.01


def test_refusals(world):
    with pytest.raises(ValueError, match="middle: got 'half', expected one of"):
        started(world, middle="half")
    with pytest.raises(ValueError, match=r"head: NLoRA rank expected in 1\.\.6, got 7"):
        jl.inits.nlora(world.fn, world.params, world.batches, methods={"head": jl.LoRA(rank=7)})
