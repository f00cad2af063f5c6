"""Exact aggregations against dense sums by numpy, and the plain average that they mend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.algebra import LowRank
from jlora.federated import fedex as fedex_file
from jlora.federated.fed_sb import bases, fed_sb
from jlora.federated.fedavg import fedavg, shares, weighted
from jlora.federated.fedex import fedex
from jlora.federated.ffa import ffa
from jlora.federated.flexlora import flexlora
from jlora.federated.flora import flora
from jlora.federated.hetlora import hetlora
from jlora.merging import to_adapter


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


def test_flora_is_exact_for_any_ranks_and_fedavg_is_not(clients):
    bank, u, v, p = clients((1, 3, 2, 6, 4))
    truth = average(u, v, p)
    assert error(flora(bank, p), truth) < 1e-6
    assert error(fedavg(bank, p), truth) > 0.3


def test_flora_with_shares_on_both_factors_would_be_wrong(clients):
    """Mutation: the trap of the paper's code base, p^2."""
    bank, u, v, p = clients()
    twice = LowRank(bank.u, bank.v * jnp.asarray(p)[:, None, None])
    with pytest.raises(AssertionError):
        assert error(flora(twice, p), average(u, v, p)) < 0.1


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


def test_flexlora_gives_each_client_the_best_of_its_rank(clients):
    bank, u, v, p = clients((1, 4, 2))
    ranks = (1, 4, 2)
    out, truth = flexlora(bank, p, ranks=ranks), average(u, v, p)
    left, s, right = np.linalg.svd(truth)
    for k, r in enumerate(ranks):
        best = left[:, :r] * s[:r] @ right[:r]
        np.testing.assert_allclose(dense(LowRank(out.u[k], out.v[k])), best, atol=1e-5)
        assert np.all(np.asarray(out.u[k][:, r:]) == 0) and np.all(np.asarray(out.v[k][r:]) == 0)
    padded = hetlora(bank, p)
    full = flexlora(bank, p, ranks=(4,))
    assert error(LowRank(full.u[0], full.v[0]), truth) < error(padded, truth)
    with pytest.raises(ValueError, match="ranks"):
        flexlora(bank, p, ranks=(1, 0))


def test_ffa_is_exact_with_one_frozen_factor(clients):
    bank, u, v, p = clients()
    shared = LowRank(jnp.broadcast_to(bank.u[:1], bank.u.shape), bank.v)
    truth = average(np.broadcast_to(u[:1], u.shape), v, p)
    got = ffa(shared, p)
    assert got.u.shape == bank.u.shape[1:]
    assert error(got, truth) < 1e-6
    with pytest.raises(ValueError, match="client 1"):
        ffa(bank, p)


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


def test_fed_sb_bases_cores_and_average():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(7, 6)).astype("f4")
    left, core, right = bases(jnp.asarray(g), 3, eta=0.1)
    step = -0.1 * np.sign(g)
    s = np.linalg.svd(step, compute_uv=False)
    best = np.asarray(left @ core @ right)
    np.testing.assert_allclose(np.linalg.norm(step - best), np.sqrt((s[3:] ** 2).sum()), rtol=1e-4)
    cores, p = rng.normal(size=(4, 3, 3)).astype("f4"), np.asarray([0.1, 0.2, 0.3, 0.4], "f4")
    got = fed_sb(left, jnp.asarray(cores), right, p)
    truth = np.einsum("n,ir,nrs,so->io", p, left, cores, right)
    np.testing.assert_allclose(dense(got), truth, atol=1e-5)
    # the gradient of the core is the full gradient seen through both bases
    full = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    seen = jax.grad(lambda c: jnp.sum(full * (left @ c @ right)))(core)
    through = left @ (left.T @ full @ right.T) @ right
    np.testing.assert_allclose(left @ seen @ right, through, atol=1e-5)


def test_fed_sb_refuses_a_rank_beyond_the_matrix():
    with pytest.raises(ValueError, match=r"rank: got 7, expected in 1..6"):
        bases(jnp.ones((8, 6)), 7)


def test_mutation_fed_sb_averaging_the_bases_too_is_not_exact():
    """What would be wrong: every client with its own bases."""
    rng = np.random.default_rng(0)
    lefts, cores, rights = (
        rng.normal(size=s).astype("f4") for s in ((3, 7, 2), (3, 2, 2), (3, 2, 6))
    )
    truth = np.einsum("nir,nrs,nso->io", lefts, cores, rights) / 3
    got = fed_sb(
        jnp.asarray(lefts.mean(0)),
        jnp.asarray(cores),
        jnp.asarray(rights.mean(0)),
        np.full(3, 1 / 3),
    )
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(dense(got), truth, atol=0.1)


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
