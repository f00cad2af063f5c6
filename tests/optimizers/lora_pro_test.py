"""LoRA-Pro: the least-squares step by numpy, the freedom of Y, Adam on the full gradient."""

import importlib

import numpy as np
import optax
import pytest

from jlora.optimizers import lora_pro
from tests.optimizers.conftest import SCALE

lib = importlib.import_module("jlora.optimizers.lora_pro")


def operator(a, b):
    """The matrix of (u_A, u_B) -> s (u_A B + A u_B), rows of everything flattened."""
    (m, r), n = a.shape, b.shape[1]
    left = np.einsum("ip,kl->ilpk", np.eye(m), b).reshape(m * n, m * r)
    right = np.einsum("ik,lq->ilkq", a, np.eye(n)).reshape(m * n, r * n)
    return SCALE * np.concatenate([left, right], 1)


def nearest(a, b, g):
    """Of all least-squares solutions the one closest to the plain gradients, by lstsq."""
    plain = np.concatenate([(SCALE * g @ b.T).ravel(), (SCALE * a.T @ g).ravel()])
    matrix = operator(a, b)
    u = plain + np.linalg.lstsq(matrix, g.ravel() - matrix @ plain, rcond=None)[0]
    return u[: a.size].reshape(a.shape), u[a.size :].reshape(b.shape)


def check_value(site):
    [(u_a, u_b)], _ = site.run(lora_pro(), 1)
    want_a, want_b = nearest(site.a, site.b, site.g)
    np.testing.assert_allclose(u_a, want_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(u_b, want_b, rtol=1e-4, atol=1e-5)


def test_value(site):
    check_value(site)


@pytest.mark.parametrize("choice", ["closest", "symmetric", "zero"])
def test_the_delta_moves_alike_for_any_y_and_no_step_is_nearer(site, choice):
    [(u_a, u_b)], _ = site.run(lora_pro(choice), 1)
    onto_a, onto_b = site.a @ np.linalg.pinv(site.a), np.linalg.pinv(site.b) @ site.b
    want = site.g @ onto_b + onto_a @ site.g @ (np.eye(5) - onto_b)
    found = SCALE * (u_a @ site.b + site.a @ u_b)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    g_a, g_b = site.gradients(site.a, site.b)
    plain = SCALE * (g_a @ site.b + site.a @ g_b)
    assert np.linalg.norm(found - site.g) < min(
        np.linalg.norm(k * plain - site.g) for k in np.linspace(0, 2, 41)
    )


def test_limit_a_zero_b_moves_alone(site):
    """What most adapters start with: only B can move, by the gradient seen through A."""
    [(u_a, u_b)], _ = site.run(lora_pro(), 1, (site.a, 0 * site.b))
    np.testing.assert_array_equal(u_a, 0)
    onto_a = site.a @ np.linalg.pinv(site.a)
    np.testing.assert_allclose(SCALE * site.a @ u_b, onto_a @ site.g, rtol=1e-4, atol=1e-5)


def test_full_moments_are_adam_on_the_equivalent_gradient(site):
    rate, b1, b2, eps = 0.05, 0.8, 0.9, 1e-3
    rule = lora_pro("closest", "full", b1, b2, eps)
    _, (end_a, end_b) = site.run(optax.chain(rule, optax.scale_by_learning_rate(rate)), 3)
    a, b = site.a, site.b
    mean = square = np.zeros_like(site.g)
    for t in range(1, 4):
        matrix = operator(a, b)
        u = np.linalg.lstsq(matrix, site.g.ravel(), rcond=None)[0]
        effect = (matrix @ u).reshape(site.g.shape)
        mean, square = b1 * mean + (1 - b1) * effect, b2 * square + (1 - b2) * effect**2
        wanted = mean / (1 - b1**t) / (np.sqrt(square / (1 - b2**t)) + eps)
        u_a, u_b = nearest(a, b, wanted)
        a, b = a - rate * u_a, b - rate * u_b
    np.testing.assert_allclose(end_a, a, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(end_b, b, rtol=1e-3, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="choice: got 'best', expected 'closest'"):
        lora_pro("best")
    with pytest.raises(ValueError, match="moments: got 'some', expected 'none' or 'full'"):
        lora_pro(moments="some")
    with pytest.raises(ValueError, match=r"b1, b2, eps: got 1\.0"):
        lora_pro(b1=1.0)


def test_mutation_another_y_is_seen(site, monkeypatch):
    monkeypatch.setattr(lib, "_sylvester", lambda left, right, c: -c)
    with pytest.raises(AssertionError):
        check_value(site)
