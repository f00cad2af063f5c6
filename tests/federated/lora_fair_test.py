"""LoRA-FAIR: closed form, descent on the cosine, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.algebra import LowRank
from jlora.federated.fedavg import fedavg
from jlora.federated.lora_fair import lora_fair


def dense(x):
    return np.asarray(x.u, "f8") @ np.asarray(x.v, "f8")


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


def test_closed_form_is_stationary_by_numpy(clients):
    bank, u, v, p = clients()
    p = p.astype("f8")
    um, vm = np.einsum("n,nir->ir", p, u), np.einsum("n,nro->ro", p, v)
    d, lam = np.einsum("n,nir,nro->io", p, u, v), 0.3
    c = np.linalg.solve(um.T @ um + lam * np.eye(3), um.T @ (d - um @ vm))
    got = lora_fair(bank, p.astype("f4"), similarity="fro", penalty=lam)
    np.testing.assert_allclose(got.v, vm + c, atol=1e-4)
    slope = -um.T @ (d - um @ (vm + c)) + lam * c
    assert np.abs(slope).max() < 1e-10
    assert np.linalg.norm(d - um @ (vm + c)) < np.linalg.norm(d - um @ vm)


def test_cosine_descent_by_numpy(clients):
    """Steps against the slope of 1 - cosine, each made shorter by step times penalty."""
    bank, u, v, p = clients()
    p = p.astype("f8")
    um, vm = np.einsum("n,nir->ir", p, u), np.einsum("n,nro->ro", p, v)
    d, c, step = np.einsum("n,nir,nro->io", p, u, v), np.zeros_like(vm), 0.5 * (vm**2).sum()
    for _ in range(6):
        m = um @ (vm + c)
        far = np.linalg.norm(d) * np.linalg.norm(m)
        z = c + step * um.T @ (d / far - (d * m).sum() * m / far / (m**2).sum())
        c = z * max(0.0, 1 - 0.02 * step / np.linalg.norm(z))
    got = lora_fair(bank, p.astype("f4"), steps=6, penalty=0.02)
    assert np.abs(c).max() > 0.05
    np.testing.assert_allclose(got.v, vm + c, atol=1e-4)


def test_without_penalty_the_residual_is_what_the_columns_of_u_cannot_reach(clients):
    bank, u, v, p = clients()
    d = np.einsum("n,nir,nro->io", p.astype("f8"), u, v)
    got = lora_fair(bank, p, similarity="fro", penalty=0.0)
    basis, _ = np.linalg.qr(np.asarray(got.u, "f8"))
    np.testing.assert_allclose(d - dense(got), d - basis @ (basis.T @ d), atol=1e-4)


def test_cosine_rises_to_that_of_the_closed_form_and_scale_is_free(clients):
    """The paper's claim in small: the corrected product points where the true average points."""
    bank, u, v, p = clients()
    d = np.einsum("n,nir,nro->io", p.astype("f8"), u, v)
    plain = cosine(dense(fedavg(bank, p)), d)
    got = cosine(dense(lora_fair(bank, p, penalty=1e-3)), d)
    best = cosine(dense(lora_fair(bank, p, similarity="fro", penalty=0.0)), d)
    assert plain + 0.05 < got <= best + 1e-4 and got > best - 0.02


@pytest.mark.parametrize("similarity", ["cos", "fro"])
def test_equal_clients_need_no_correction(clients, similarity):
    bank, *_ = clients()
    same = LowRank(*(jnp.broadcast_to(t[:1], t.shape) for t in bank))
    got = lora_fair(same, jnp.full(4, 0.25), similarity=similarity)
    np.testing.assert_allclose(got.v, bank.v[0], atol=1e-5)


@pytest.mark.parametrize("similarity, penalty", [("cos", 10.0), ("fro", 1e8)])
def test_a_large_penalty_leaves_the_plain_average(clients, similarity, penalty):
    bank, _, _, p = clients()
    got = lora_fair(bank, p, similarity=similarity, penalty=penalty)
    np.testing.assert_allclose(got.v, fedavg(bank, p).v, atol=1e-4)


def test_gradient_is_finite_and_by_finite_differences(clients):
    bank, _, _, p = clients()
    direction = jnp.asarray(np.random.default_rng(2).normal(size=bank.v.shape), jnp.float32)

    def loss(t):
        out = lora_fair(LowRank(bank.u, bank.v + t * direction), jnp.asarray(p), steps=20)
        return jnp.sum(jnp.sin(out.u @ out.v))

    h, run = 1e-2, jax.jit(loss)
    numeric = (run(jnp.float32(h)) - run(jnp.float32(-h))) / (2 * h)
    np.testing.assert_allclose(jax.grad(run)(jnp.float32(0)), numeric, rtol=3e-2)


def test_mutation_minimising_the_cosine_turns_away(clients):
    bank, u, v, p = clients()
    d = np.einsum("n,nir,nro->io", p.astype("f8"), u, v)
    with pytest.raises(AssertionError):
        got = lora_fair(bank, p, rate=-0.5)
        assert cosine(dense(got), d) > cosine(dense(fedavg(bank, p)), d)


@pytest.mark.parametrize("bad", [{"similarity": "l1"}, {"penalty": -1.0}, {"steps": 0}])
def test_refusals(clients, bad):
    bank, _, _, p = clients()
    with pytest.raises(ValueError, match="got"):
        lora_fair(bank, p, **bad)
