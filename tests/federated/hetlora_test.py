"""HetLoRA: weights by norms, truncation, self-pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.federated import hetlora as hetlora_file
from jlora.federated.fedavg import fedavg
from jlora.federated.hetlora import hetlora, norm_weights, pruned_rank, tail, truncate


def test_value_by_numpy(clients):
    bank, u, v, p = clients((1, 3, 2))
    s = np.linalg.norm(u @ v, axis=(1, 2))
    w = p * s / (p * s).sum()
    got = hetlora(bank, p)
    np.testing.assert_allclose(got.u, np.einsum("n,nir->ir", w, u), atol=1e-5)
    np.testing.assert_allclose(got.v, np.einsum("n,nro->ro", w, v), atol=1e-5)


def test_equal_norms_leave_the_priors_and_no_training_too(clients):
    bank, _, _, p = clients()
    same = LowRank(*(jnp.broadcast_to(t[:1], t.shape) for t in bank))
    np.testing.assert_allclose(norm_weights(same, jnp.asarray(p)), p, rtol=1e-5)
    fresh = LowRank(bank.u, jnp.zeros_like(bank.v))
    np.testing.assert_allclose(norm_weights(fresh, jnp.asarray(p)), p, rtol=1e-5)


def test_a_client_that_learned_nothing_no_longer_dilutes(clients):
    """The claim in small: with zero clients in the bank the average stays closer to the others."""
    bank, u, v, _ = clients()
    v[2:] = 0.0
    truth = np.einsum("nir,nro->io", u[:2], v[:2]) / 2
    bank, w = LowRank(bank.u, jnp.asarray(v, jnp.float32)), jnp.full(4, 0.25)
    ratio = [np.linalg.norm(x.u @ x.v) / np.linalg.norm(truth) for x in (
        hetlora(bank, w), fedavg(bank, w))]  # fmt: skip
    assert np.all(np.asarray(norm_weights(bank, w))[2:] == 0)
    assert ratio[0] > 2 * ratio[1]


def test_mutation_norms_that_do_not_count(clients, monkeypatch):
    monkeypatch.setattr(hetlora_file, "norm_weights", lambda b, w: w)
    with pytest.raises(AssertionError):
        test_value_by_numpy(clients)


def test_truncation_keeps_the_leading_part(clients):
    bank, _, _, p = clients()
    x = hetlora(bank, p)
    got = truncate(x, (1, 3, 2))
    for k, r in enumerate((1, 3, 2)):
        np.testing.assert_allclose(got.u[k] @ got.v[k], x.u[:, :r] @ x.v[:r], atol=1e-5)
    with pytest.raises(ValueError, match="ranks"):
        truncate(x, (4,))


def test_self_pruning_follows_the_tail(clients):
    bank, u, v, _ = clients((8, 8), d_in=9, d_out=9)
    before = LowRank(bank.u[0], bank.v[0])
    expected = np.linalg.norm(u[0][:, 6:]) * np.linalg.norm(v[0][6:])
    np.testing.assert_allclose(tail(before, 6), expected, rtol=1e-5)
    smaller = LowRank(before.u.at[:, 6:].multiply(0.5), before.v)
    larger = LowRank(before.u.at[:, 6:].multiply(2.0), before.v)
    assert int(pruned_rank(before, smaller, rank=8, gamma=0.75)) == 6
    assert int(pruned_rank(before, larger, rank=8, gamma=0.75)) == 8
    zero = LowRank(jnp.zeros_like(before.u), before.v)
    assert float(tail(zero, 6)) == 0
    slope = jax.grad(lambda u: tail(LowRank(u, before.v), 6))(zero.u)
    assert np.isfinite(np.asarray(slope)).all()
    for bad in ({"rank": 9, "gamma": 0.5}, {"rank": 8, "gamma": 0.0}):
        with pytest.raises(ValueError, match="got"):
            pruned_rank(before, smaller, **bad)
