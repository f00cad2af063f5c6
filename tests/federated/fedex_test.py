"""FedEx-LoRA: the mean factors and their residual are the average together."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.federated import fedex as fedex_file
from jlora.federated.fedavg import fedavg, weighted
from jlora.federated.fedex import fedex


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def average(u, v, p):
    return np.einsum("n,nir,nro->io", p.astype("f8"), u, v)


def test_fedex_is_exact_and_its_residual_is_what_fedavg_loses(clients):
    bank, u, v, p = clients()
    mean, residual = fedex(bank, p)
    truth = average(u, v, p)
    np.testing.assert_allclose(dense(mean) + dense(residual), truth, atol=1e-5)
    np.testing.assert_allclose(dense(residual), truth - dense(fedavg(bank, p)), atol=1e-5)
    assert mean.u.shape[1] == 3 and residual.u.shape[1] == 15


def test_fedex_residual_cut_to_a_rank_loses_the_tail(clients):
    bank, u, v, p = clients()
    mean, residual = fedex(bank, p, rank=2)
    wanted = average(u, v, p) - dense(mean)
    s = np.linalg.svd(wanted, compute_uv=False)
    assert residual.u.shape[1] == 2
    np.testing.assert_allclose(
        np.linalg.norm(dense(residual) - wanted), np.sqrt((s[2:] ** 2).sum()), rtol=1e-4
    )
    with pytest.raises(ValueError, match="rank"):
        fedex(bank, p, rank=0)


def test_fedex_of_equal_clients_has_no_residual(clients):
    bank, *_ = clients()
    same = LowRank(*(jnp.broadcast_to(t[:1], t.shape) for t in bank))
    _, residual = fedex(same, jnp.full(4, 0.25))
    assert np.abs(dense(residual)).max() < 1e-5


@pytest.mark.parametrize("broken", ["mean of u alone", "unweighted"])
def test_mutation_fedex(clients, monkeypatch, broken):
    bank, u, v, p = clients()
    wrong = {
        "mean of u alone": lambda b, w: LowRank(weighted(w, b.u), b.v[0]),
        "unweighted": lambda b, w: LowRank(b.u.mean(0), b.v.mean(0)),
    }[broken]
    monkeypatch.setattr(fedex_file, "concat", wrong)
    with pytest.raises(AssertionError):
        mean, residual = fedex(bank, p)
        np.testing.assert_allclose(dense(mean) + dense(residual), average(u, v, p), atol=1e-3)
