"""LoRA-FA: one step by numpy, three by PEFT's optimizer, and an A that is frozen in the adapter."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft.optimizers.lorafa as theirs_lib
import pytest
import torch
from peft import LoraConfig, get_peft_model

import jlora as jl
from jlora.optimizers import lora_fa
from tests.optimizers.conftest import SCALE

lib = importlib.import_module("jlora.optimizers.lora_fa")


def check_value(site):
    [(u_a, u_b)], (a, _) = site.run(lora_fa(), 1)
    np.testing.assert_array_equal(u_a, 0)
    np.testing.assert_array_equal(a, site.a.astype("f4"))
    want = np.linalg.inv(site.a.T @ site.a) @ (SCALE * site.a.T @ site.g) / SCALE**2
    np.testing.assert_allclose(u_b, want, rtol=1e-4)
    onto_a = site.a @ np.linalg.pinv(site.a)
    np.testing.assert_allclose(SCALE * site.a @ u_b, onto_a @ site.g, rtol=1e-4, atol=1e-5)


def test_value_and_the_step_of_the_delta(site):
    check_value(site)


def test_three_steps_of_pefts(site, monkeypatch):
    monkeypatch.setattr(theirs_lib, "is_bf16_available", lambda: False)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2 * SCALE, target_modules=["0"]))
    a, b = (getattr(model.base_model.model[0], f"lora_{n}").default.weight for n in "AB")
    with torch.no_grad():
        a.copy_(torch.tensor(site.a.T))
        b.copy_(torch.tensor(site.b.T))
    theirs = theirs_lib.create_lorafa_optimizer(model, r=2, lora_alpha=2 * SCALE, lr=0.05)
    g = torch.tensor(site.g.T, dtype=torch.float32)
    for _ in range(3):
        theirs.zero_grad()
        (SCALE * (b @ a) * g).sum().backward()
        theirs.step()
    adam = optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale_by_learning_rate(0.05))
    _, (_, end_b) = site.run(optax.chain(lora_fa(), adam), 3)
    np.testing.assert_allclose(end_b, b.detach().numpy().T, rtol=1e-3, atol=1e-4)


def test_a_may_be_frozen_in_the_adapter():
    params, x = {"w": jnp.zeros((6, 5))}, jnp.ones((3, 6))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    found = {}
    for freeze in (True, False):
        method = jl.LoRA(2, alpha=1.4, freeze_a=freeze)
        adapter = jl.init(jax.random.key(0), apply, params, x, methods={"w": method})
        grads = jax.tree.map(jnp.ones_like, adapter.trainable)
        rule = lora_fa()
        state = rule.init(adapter.trainable)
        updates, _ = rule.update(grads, state, adapter.trainable, frozen=adapter.frozen)
        assert set(updates["w"]) == set(adapter.trainable["w"])
        found[freeze] = updates["w"]["b"]
    np.testing.assert_array_equal(found[True], found[False])


def test_refusal():
    with pytest.raises(ValueError, match="damping: got -1, expected a positive number"):
        lora_fa(-1)


def test_mutation_a_gram_matrix_of_ones_is_seen(site, monkeypatch):
    monkeypatch.setattr(lib, "gram_a", lambda a: a.mT @ a * 0 + jnp.eye(2))
    with pytest.raises(AssertionError):
        check_value(site)
