"""OLoRA: numpy's QR, the limit of full rank, PEFT."""

import importlib

import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.olora")


def check_value(world):
    adapter = jl.inits.olora(world.fn, world.params, world.batches, methods=world.methods)
    world.unchanged(adapter)
    for path, w in world.weights.items():
        p = world.arrays(adapter, path)
        q, r = np.linalg.qr(np.swapaxes(w, -1, -2))
        want = np.swapaxes(q[..., :2] @ r[..., :2, :], -1, -2)
        np.testing.assert_allclose(p["a"] @ p["b"], want, atol=2e-5)
        eye = np.broadcast_to(np.eye(2), (*w.shape[:-2], 2, 2))
        np.testing.assert_allclose(p["b"] @ np.swapaxes(p["b"], -1, -2), eye, atol=2e-5)
        np.testing.assert_array_equal(p["a"], p["a0"])


def test_value(world):
    check_value(world)


def test_limit_full_rank_at_scale_one_leaves_nothing(world):
    methods = {"head": jl.LoRA(rank=6, alpha=6.0)}
    adapter = jl.inits.olora(world.fn, world.params, world.batches, methods=methods)
    ((_, left),) = jl.inits.residual_leaves(world.params, adapter)
    np.testing.assert_allclose(left, 0, atol=1e-5)
    with pytest.raises(ValueError, match=r"head: OLoRA rank expected in 1\.\.6, got 7"):
        methods = {"head": jl.LoRA(rank=7)}
        jl.inits.olora(world.fn, world.params, world.batches, methods=methods)


def test_it_is_the_start_of_peft(world):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    layer = torch.nn.Linear(8, 6, bias=False)
    layer.weight.data = torch.tensor(np.asarray(world.params["head"]))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="olora")
    theirs = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    adapter = jl.inits.olora(world.fn, world.params, world.batches, methods=world.methods)
    p = world.arrays(adapter, "head")
    delta = theirs.get_delta_weight("default").detach().numpy().T
    np.testing.assert_allclose(3 * p["a"] @ p["b"], delta, atol=1e-5)
    left = dict(jl.inits.residual_leaves(world.params, adapter))
    np.testing.assert_allclose(left["head"], theirs.base_layer.weight.detach(), atol=1e-5)


def test_mutation_the_last_rows_are_seen(world, monkeypatch):
    good = module.numerics.qr
    monkeypatch.setattr(
        module.numerics, "qr", lambda w: tuple(t[::-1, ::-1] for t in good(w[::-1, ::-1]))
    )
    with pytest.raises(AssertionError):
        check_value(world)
