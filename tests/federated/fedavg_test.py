"""Averages of factors, and the shares of clients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.federated.fedavg import fedavg, shares
from jlora.federated.flora import flora
from jlora.federated.hetlora import hetlora
from jlora.merging import per_site


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def average(u, v, p):
    return np.einsum("n,nir,nro->io", p.astype("f8"), u, v)


def error(x, truth):
    return np.linalg.norm(dense(x) - truth) / np.linalg.norm(truth)


def test_shares_are_of_examples():
    np.testing.assert_allclose(shares(jnp.asarray([10, 30, 0])), [0.25, 0.75, 0.0])


def test_fedavg_by_numpy_is_not_the_average(clients):
    bank, u, v, p = clients()
    got = fedavg(bank, p)
    np.testing.assert_allclose(got.u, np.einsum("n,nir->ir", p, u), atol=1e-5)
    np.testing.assert_allclose(got.v, np.einsum("n,nro->ro", p, v), atol=1e-5)
    assert error(got, average(u, v, p)) > 0.3


@pytest.mark.parametrize("fn", [fedavg, flora, hetlora])
def test_equal_clients_and_one_client_are_themselves(clients, fn):
    bank, *_ = clients()
    same = LowRank(*(jnp.broadcast_to(t[:1], t.shape) for t in bank))
    one = LowRank(*(t[:1] for t in bank))
    for x, p in ((same, jnp.asarray([0.1, 0.2, 0.3, 0.4])), (one, jnp.ones(1))):
        np.testing.assert_allclose(dense(fn(x, p)), dense(bank)[0], atol=1e-5)


@pytest.mark.parametrize("fn", [fedavg, flora, hetlora])
def test_gradient_by_finite_differences(clients, fn):
    bank, _, _, p = clients((2, 3, 1))
    direction = LowRank(*(jnp.asarray(np.random.default_rng(7).normal(size=t.shape), t.dtype)
                          for t in bank))  # fmt: skip

    def loss(t, w):
        out = fn(LowRank(*(x + t * d for x, d in zip(bank, direction, strict=True))), w)
        return jnp.sum(jnp.sin(out.u @ out.v))

    h, (slope, by_weight) = 1e-2, jax.grad(loss, (0, 1))(jnp.float32(0), jnp.asarray(p))
    numeric = (loss(jnp.float32(h), p) - loss(jnp.float32(-h), p)) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=2e-2, atol=1e-2)
    assert np.isfinite(np.asarray(by_weight)).all() and np.abs(np.asarray(by_weight)).max() > 0


@pytest.mark.parametrize("fn", [fedavg, flora, hetlora])
def test_all_sites_and_layers_of_a_bank(clients, fn):
    """`per_site` maps an aggregation over sites and stacked layers."""
    first, _, _, p = clients((2, 3, 1))
    second, *_ = clients((2, 3, 1), seed=1)
    layers = LowRank(*(jnp.stack(pair, axis=1) for pair in zip(first, second, strict=True)))
    made = per_site(fn)({"one": first, "layers": layers}, p)
    for got, bank in ((made["one"], first), (LowRank(*(t[1] for t in made["layers"])), second)):
        np.testing.assert_allclose(dense(got), dense(fn(bank, p)), atol=1e-4)
