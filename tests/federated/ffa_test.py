"""FFA-LoRA: exact averages, linear noise, alpha and rate as one setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.federated import ffa as ffa_file
from jlora.federated.fedavg import fedavg
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


def train(method, rate, steps=5):
    """SGD on a small loss through `lift`, from a b that is not zero; the delta after `steps`."""
    rng = np.random.default_rng(3)
    w, x, b = (jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in ((5, 4), (9, 5), (2, 4)))

    def apply(p, x):
        return x @ p["w"]

    start = jl.init(jax.random.key(1), apply, {"w": w}, x, methods={"w": method})
    scale = start.frozen["w"]["scale"]  # the same delta at the start, whatever alpha is
    start = start.replace(trainable={"w": {**start.trainable["w"], "b": b / scale}})

    def loss(t):
        return jnp.sum(jnp.sin(jl.lift(apply)({"w": w}, start.replace(trainable=t), x)) ** 2)

    t = start.trainable
    for _ in range(steps):
        t = jax.tree.map(lambda p, g: p - rate * g, t, jax.grad(loss)(t))
    return np.asarray(jl.delta({"w": w}, start.replace(trainable=t))["w"])


def test_ffa_alpha_and_rate_are_one_setting_and_for_lora_they_are_not():
    """Doubling alpha is the same as four times the rate, if `a` is frozen."""
    frozen = [train(jl.LoRA(2, k, freeze_a=True), r) for k, r in ((4.0, 0.01), (2.0, 0.04))]
    np.testing.assert_allclose(*frozen, rtol=1e-3, atol=1e-5)
    both = [train(jl.LoRA(2, k), r) for k, r in ((4.0, 0.01), (2.0, 0.04))]
    assert np.abs(both[0] - both[1]).max() > 1e-3


def noisy(clients, s):
    """Aggregates of uploads with noise of size s: (FFA-LoRA, averaged factors)."""
    bank, _, _, p = clients()
    rng = np.random.default_rng(5)
    nu, nv = (jnp.asarray(s * rng.normal(size=t.shape), jnp.float32) for t in bank)
    shared = jnp.broadcast_to(bank.u[:1], bank.u.shape)  # no client uploads it: no noise
    return dense(ffa(LowRank(shared, bank.v + nv), p)), dense(
        fedavg(LowRank(bank.u + nu, bank.v + nv), p)
    )


def test_noise_is_linear_with_a_frozen_factor_and_quadratic_without(clients):
    """Doubling the noise doubles the damage of FFA-LoRA; LoRA adds a product of two noises."""
    clean, once, twice = (noisy(clients, s) for s in (0.0, 1.0, 2.0))
    linear, quadratic = (t - 2 * o + c for c, o, t in zip(clean, once, twice, strict=True))
    assert np.abs(once[0] - clean[0]).max() > 0.1
    assert np.abs(linear).max() < 1e-4
    assert np.abs(quadratic).max() > 0.1


def test_mutation_clients_counted_alike(clients, monkeypatch):
    monkeypatch.setattr(ffa_file, "weighted", lambda w, x: jnp.mean(x, axis=0))
    with pytest.raises(AssertionError):
        test_ffa_is_exact_with_one_frozen_factor(clients)
