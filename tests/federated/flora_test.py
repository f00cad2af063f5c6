"""FLoRA: stacked adapters are the average of the deltas, on matrices and on a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.federated import flora as flora_file
from jlora.federated.fedavg import fedavg, shares
from jlora.federated.flora import flora
from jlora.merging import to_adapter
from jlora.merging.exact.concat import concat


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def average(u, v, p):
    return np.einsum("n,nir,nro->io", p.astype("f8"), u, v)


def error(x, truth):
    return np.linalg.norm(dense(x) - truth) / np.linalg.norm(truth)


def test_flora_is_exact_for_any_ranks_and_fedavg_is_not(clients):
    bank, u, v, p = clients((1, 3, 2, 6, 4))
    truth = average(u, v, p)
    assert error(flora(bank, p), truth) < 1e-6
    assert error(fedavg(bank, p), truth) > 0.3


def test_mutation_shares_on_both_factors(clients, monkeypatch):
    """The trap of the paper's code base, p^2."""
    monkeypatch.setattr(flora_file, "concat", lambda bank, p: concat(bank, p * p))
    with pytest.raises(AssertionError):
        test_flora_is_exact_for_any_ranks_and_fedavg_is_not(clients)


def test_flora_round_on_a_model():
    """Clients of different rank and alpha; after merging, the weight is the average of theirs."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)}

    def apply(p, x):
        return x @ p["w"]

    def client(seed, rank, alpha):
        a = jl.init(jax.random.key(seed), apply, params, jnp.ones((2, 5)), methods={
            "w": jl.LoRA(rank, alpha)})  # fmt: skip
        return a.replace(trainable=jax.tree.map(lambda t: t + 0.3, a.trainable))

    many = [client(0, 1, 2.0), client(1, 3, 6.0), client(2, 2, 1.0)]
    counts = jnp.asarray([20, 50, 30])
    bank, p, sites = jl.merging.gather(many, shares(counts))
    stacked = to_adapter({"w": flora(bank["w"], p)}, sites)
    expected = sum(
        c / 100 * jl.merge(params, a)["w"] for c, a in zip((20, 50, 30), many, strict=True)
    )
    np.testing.assert_allclose(jl.merge(params, stacked)["w"], expected, atol=1e-5)
