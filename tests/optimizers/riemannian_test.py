"""Riemannian preconditioning: one step by numpy and by PEFT, and the step of the delta."""

import importlib

import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer

from jlora.optimizers import riemannian
from tests.optimizers.conftest import SCALE

lib = importlib.import_module("jlora.optimizers.riemannian")

DAMPING = 0.3  # large, so that where it stands is seen


def check_value(site):
    [(u_a, u_b)], _ = site.run(riemannian(DAMPING), 1)
    g_a, g_b = site.gradients(site.a, site.b)
    eye = DAMPING * np.eye(2)
    want_a = g_a @ np.linalg.inv(site.b @ site.b.T + eye) / SCALE**2
    want_b = np.linalg.inv(site.a.T @ site.a + eye) @ g_b / SCALE**2
    np.testing.assert_allclose(u_a, want_a, rtol=1e-5)
    np.testing.assert_allclose(u_b, want_b, rtol=1e-5)


def test_value(site):
    check_value(site)


def test_limit_the_delta_moves_by_the_projected_gradient(site):
    [(u_a, u_b)], _ = site.run(riemannian(1e-8), 1)
    onto_a = site.a @ np.linalg.pinv(site.a)
    onto_b = np.linalg.pinv(site.b) @ site.b
    np.testing.assert_allclose(SCALE * u_a @ site.b, site.g @ onto_b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(SCALE * site.a @ u_b, onto_a @ site.g, rtol=1e-4, atol=1e-5)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.w(x)


def test_three_steps_of_pefts(site):
    model = get_peft_model(Linear(), LoraConfig(r=2, lora_alpha=2 * SCALE, target_modules=["w"]))
    a, b = (getattr(model.base_model.model.w, f"lora_{n}").default.weight for n in "AB")
    with torch.no_grad():
        a.copy_(torch.tensor(site.a.T))
        b.copy_(torch.tensor(site.b.T))
    theirs = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.05, reg=DAMPING)
    for _ in range(3):
        theirs.zero_grad()
        (SCALE * (b @ a) * torch.tensor(site.g.T, dtype=torch.float32)).sum().backward()
        theirs.step()
    rate = 0.05 * SCALE**2  # theirs does not divide by s^2
    ours = optax.chain(riemannian(DAMPING), optax.scale_by_learning_rate(rate))
    _, (end_a, end_b) = site.run(ours, 3)
    np.testing.assert_allclose(end_a, a.detach().numpy().T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end_b, b.detach().numpy().T, rtol=1e-4, atol=1e-5)


def test_refusal():
    with pytest.raises(ValueError, match="damping: got 0, expected a positive number"):
        riemannian(0)


def test_mutation_another_gram_matrix_is_seen(site, monkeypatch):
    monkeypatch.setattr(lib, "gram_b", lambda b: b @ b.mT * 0 + 1.0)
    with pytest.raises(AssertionError):
        check_value(site)
