"""LoRA-GA: the first step of SGD, layer by layer too, PEFT's subspaces, refusals."""

import importlib

import jax
import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.lora_ga")
METHODS = {"layers|head": jl.LoRA(rank=2, alpha=6.0)}  # scale 3


@pytest.fixture(scope="module")
def adapter(world):
    return jl.inits.lora_ga(world.loss, world.params, world.batches, methods=METHODS)


def check_first_step(world, adapter):
    """- eta s^2 c^2 times the best approximation of the gradient of rank 2r, to first order."""
    world.unchanged(adapter)
    tuned = jl.lift(world.loss)

    def total(trainable):
        each = (tuned(world.params, adapter.replace(trainable=trainable), b) for b in world.batches)
        return sum(each)

    g, eta = jax.grad(total)(adapter.trainable), 1e-6
    for path, full in world.gradients().items():
        p, d = world.arrays(adapter, path), {k: np.asarray(v, "f8") for k, v in g[path].items()}
        moved = 3 * ((p["a"] - eta * d["a"]) @ (p["b"] - eta * d["b"]) - p["a"] @ p["b"]) / eta
        u, s, vt = np.linalg.svd(full, full_matrices=False)
        best = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
        c2 = full.shape[-1] ** 0.5 / 16
        size = np.abs(best).max()
        np.testing.assert_allclose(moved / size, -9 * c2 * best / size, atol=2e-3)


def test_the_first_step_is_that_of_full_fine_tuning(world, adapter):
    check_first_step(world, adapter)


def test_mutation_directions_that_are_shared_are_seen(world, monkeypatch):
    both = lambda r: (slice(0, r), slice(0, r))  # noqa: E731
    monkeypatch.setattr(module, "DIRECTIONS", {"ArB2r": both})
    wrong = jl.inits.lora_ga(world.loss, world.params, world.batches, methods=METHODS)
    with pytest.raises(AssertionError):
        check_first_step(world, wrong)


def test_one_matrix_at_a_time_gives_the_same(world, adapter):
    few = jl.inits.lora_ga(world.loss, world.params, world.batches, methods=METHODS, limit=1)
    for path in world.weights:
        p, q = world.arrays(adapter, path), world.arrays(few, path)
        np.testing.assert_allclose(p["a"] @ p["b"], q["a"] @ q["b"], atol=1e-4)


def test_a_small_start_of_a_large_gamma(world):
    small = jl.inits.lora_ga(
        world.loss, world.params, world.batches, methods=METHODS, gamma=1e8, direction="A2rBr"
    )
    assert max(np.abs(t).max() for t in jax.tree.leaves(small.trainable)) < 1e-3


def test_the_subspaces_of_peft(world, adapter):
    """PEFT's lora_A and lora_B have the directions, with sizes of its own."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    layer = torch.nn.Linear(8, 6, bias=False)
    layer.weight.data = torch.tensor(np.asarray(world.params["head"]))
    layer._peft_loraga_grad = torch.tensor(world.gradients()["head"].T, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )  # fmt: skip
    theirs = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    p = world.arrays(adapter, "head")
    for ours, key in ((p["a"].T, "lora_A"), (p["b"], "lora_B")):
        rows = getattr(theirs, key)["default"].weight.detach().numpy()
        rows = rows if key == "lora_A" else rows.T
        cos = np.sum(ours * rows, 1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(np.abs(cos), 1, atol=1e-3)


def test_refusals(world):
    args = (world.loss, world.params, world.batches)
    with pytest.raises(ValueError, match=r"head: LoRA-GA rank expected in 1\.\.3, got 4"):
        jl.inits.lora_ga(*args, methods={"head": jl.LoRA(rank=4)})
    with pytest.raises(ValueError, match="direction: got 'up', expected one of"):
        jl.inits.lora_ga(*args, methods=METHODS, direction="up")
    bad = [world.batches[0].at[0, 0, 0].set(np.nan)]
    with pytest.raises(ValueError, match="head: got gradients that are not finite"):
        jl.inits.lora_ga(world.loss, world.params, bad, methods=METHODS)
    with pytest.raises(TypeError, match="batches: got list_iterator"):
        jl.inits.lora_ga(world.loss, world.params, iter(world.batches), methods=METHODS)
