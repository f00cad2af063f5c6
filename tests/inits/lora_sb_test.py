"""LoRA-SB: the first step of Adam, its tail, the gradient in the frozen directions."""

import importlib

import jax
import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.lora_sb")
METHODS = {"layers|head": jl.LoRA(rank=3, alpha=6.0)}  # scale 2


def started(world, **more):
    args = (world.loss, world.params, world.batches)
    return jl.inits.lora_sb(*args, methods=METHODS, step=0.1, **more)


def check_value(world, adapter):
    for path, g in world.gradients().items():
        p, step = world.arrays(adapter, path), -0.1 * np.sign(g)
        delta = 2 * p["a"] @ p["core"] @ p["b"]
        s = np.linalg.svd(step, compute_uv=False)
        tail = np.sqrt((s[..., 3:] ** 2).sum(-1))
        np.testing.assert_allclose(np.linalg.norm(step - delta, axis=(-2, -1)), tail, rtol=1e-4)
        assert np.all(tail < 0.8 * np.linalg.norm(step, axis=(-2, -1)))
        eye = np.broadcast_to(np.eye(3), (*g.shape[:-2], 3, 3))
        np.testing.assert_allclose(np.swapaxes(p["a"], -1, -2) @ p["a"], eye, atol=1e-5)
        np.testing.assert_allclose(p["b"] @ np.swapaxes(p["b"], -1, -2), eye, atol=1e-5)
        assert set(adapter.trainable[path]) == {"core"}


@pytest.fixture(scope="module")
def adapter(world):
    return started(world)


def test_value(world, adapter):
    check_value(world, adapter)


def test_mutation_a_step_uphill_is_seen(world, monkeypatch):
    good = module.first_step
    monkeypatch.setattr(module, "first_step", lambda g, s, rank, step: good(-g, s, rank, step))
    with pytest.raises(AssertionError):
        check_value(world, started(world))


def test_the_gradient_of_the_core_is_that_of_the_weight_in_its_directions(world, adapter):
    tuned, merged = jl.lift(world.loss), jl.merge(world.params, adapter)
    batch = world.batches[0]
    got = jax.grad(lambda t: tuned(world.params, adapter.replace(trainable=t), batch))(
        adapter.trainable
    )["head"]["core"]
    full = np.asarray(jax.grad(world.loss)(merged, batch)["head"], "f8").T
    p = world.arrays(adapter, "head")
    np.testing.assert_allclose(got, 2 * p["a"].T @ full @ p["b"].T, atol=1e-3)


def test_refusals(world):
    args = (world.loss, world.params, world.batches)
    with pytest.raises(ValueError, match="step: got 0, expected a positive number"):
        jl.inits.lora_sb(*args, methods=METHODS, step=0)
    with pytest.raises(ValueError, match=r"head: LoRA-SB rank expected in 1\.\.6, got 7"):
        jl.inits.lora_sb(*args, methods={"head": jl.LoRA(rank=7)}, step=0.1)
    with pytest.raises(ValueError, match="got none, expected at least one"):
        jl.inits.lora_sb(world.loss, world.params, [], methods=METHODS, step=0.1)
