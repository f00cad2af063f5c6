"""FFA-LoRA: exact averages, linear noise, alpha and rate as one setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.federated import ffa as ffa_file
from jlora.federated.ffa import ffa


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def average(u, v, p):
    return np.einsum("n,nir,nro->io", p.astype("f8"), u, v)


def error(x, truth):
    return np.linalg.norm(dense(x) - truth) / np.linalg.norm(truth)


def test_ffa_is_exact_with_one_frozen_factor(clients):
    bank, u, v, p = clients()
    shared = LowRank(jnp.broadcast_to(bank.u[:1], bank.u.shape), bank.v)
    truth = average(np.broadcast_to(u[:1], u.shape), v, p)
    got = ffa(shared, p)
    assert got.u.shape == bank.u.shape[1:]
    assert error(got, truth) < 1e-6
    with pytest.raises(ValueError, match="client 1"):
        ffa(bank, p)
    with pytest.raises(ValueError, match="client 2"):  # a single element is another one
        ffa(LowRank(shared.u.at[2, 1, 1].add(0.5), bank.v), p)


def test_equal_clients_and_one_client_are_themselves(clients):
    bank, *_ = clients()
    same = LowRank(*(jnp.broadcast_to(t[:1], t.shape) for t in bank))
    one = LowRank(*(t[:1] for t in bank))
    for x, p in ((same, jnp.full(4, 0.25)), (one, jnp.ones(1))):
        np.testing.assert_allclose(dense(ffa(x, p)), dense(bank)[0], atol=1e-5)


def train(freeze, alpha, rate, steps=5):
    """SGD on a small loss; the delta after `steps`."""
    rng = np.random.default_rng(3)
    w, a, x = (jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in ((5, 4), (5, 2), (9, 5)))

    def loss(a, b):
        return jnp.sum(jnp.sin(x @ (w + alpha * a @ b)) ** 2)

    b = jnp.zeros((2, 4))
    for _ in range(steps):
        ga, gb = jax.grad(loss, (0, 1))(a, b)
        a, b = a - (0.0 if freeze else rate) * ga, b - rate * gb
    return np.asarray(alpha * a @ b)


def test_ffa_alpha_and_rate_are_one_setting_and_for_lora_they_are_not():
    np.testing.assert_allclose(train(True, 2.0, 0.01), train(True, 1.0, 0.04), rtol=1e-3)
    assert np.abs(train(False, 2.0, 0.01) - train(False, 1.0, 0.04)).max() > 1e-3


def test_noise_is_linear_with_a_frozen_factor_and_quadratic_without(clients):
    """Doubling the noise doubles the damage of FFA-LoRA; LoRA adds a product of two noises."""
    _, u, v, _ = clients()
    rng = np.random.default_rng(5)
    nu, nv = rng.normal(size=u[0].shape), rng.normal(size=v[0].shape)
    frozen = [u[0] @ (v[0] + s * nv) - u[0] @ v[0] for s in (1.0, 2.0)]
    both = [(u[0] + s * nu) @ (v[0] + s * nv) - u[0] @ v[0] for s in (1.0, 2.0)]
    np.testing.assert_allclose(frozen[1], 2 * frozen[0])
    assert np.abs(both[1] - 2 * both[0]).max() > 1.0


def test_mutation_clients_counted_alike(clients, monkeypatch):
    monkeypatch.setattr(ffa_file, "weighted", lambda w, x: jnp.mean(x, axis=0))
    with pytest.raises(AssertionError):
        test_ffa_is_exact_with_one_frozen_factor(clients)
