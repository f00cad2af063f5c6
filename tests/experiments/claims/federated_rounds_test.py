"""Rounds of clients: exact averages, ranks, privacy; on a linear model with one layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import federated_rounds as rounds
from jlora.algebra import LowRank
from jlora.federated import fed_sb, fedavg, fedex, ffa, flora

RANKS = (2, 2, 1)
D = 6


def linear(params, hidden, mask, head):
    """Logits of the sum of all four kernels' outputs."""
    x = jnp.einsum("btd,bt->bd", hidden, mask.astype(jnp.float32))
    held = params["layers"]["attention"]
    y = sum(x @ held[s]["kernel"][0] for s in ("query", "key", "value", "out"))
    return jnp.einsum("bd,bcd->bc", y, head)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    base = {"layers": {"attention": {s: {"kernel": 0.1 * f32(1, D, D)}
                                     for s in ("query", "key", "value", "out")}}}  # fmt: skip
    pool = rng.integers(0, 2, (3, 10, 3)).astype(np.int32)
    pool[..., 0] = rng.integers(0, 20, (3, 10))
    return rounds.Texts(linear, base, f32(20, 3, D), jnp.ones((20, 3), bool), f32(2, 2, D),
                        jnp.asarray(pool), jnp.asarray([10, 6, 3], jnp.int32))  # fmt: skip


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(rounds, "ROUNDS", 1)


def program(name, aggregate, **changes):
    return rounds.Program(name, aggregate, **{"ranks": RANKS, "steps": 3, "batch": 4, **changes})


def kernels(params):
    return {s: np.asarray(params["layers"]["attention"][s]["kernel"][0], "f8")
            for s in ("query", "key", "value", "out")}  # fmt: skip


@pytest.mark.parametrize("fresh", [False, True], ids=["fedex", "flora"])
def test_exact_systems_give_the_average_of_what_the_clients_have(texts, fresh):
    own = rounds.train(program("alone", None), texts, 0)
    system = flora.SYSTEM if fresh else fedex.SYSTEM
    (found,) = rounds.train(program("exact", system.aggregate, fresh=fresh), texts, 0).models
    start, models, p = kernels(texts.base), [kernels(m) for m in own.models], np.array([10, 6, 3])
    for site, w in kernels(found).items():
        deltas = np.stack([m[site] - start[site] for m in models])
        assert np.abs(deltas).max() > 1e-3
        expected = start[site] + np.einsum("n,nij->ij", p / p.sum(), deltas)
        np.testing.assert_allclose(w, expected, atol=1e-6)
        ranks = [np.linalg.matrix_rank(d, tol=1e-5) for d in deltas]
        assert ranks == list(RANKS)  # a client trains the ranks that it has


def test_the_average_of_factors_is_another_model(texts):
    both = [rounds.train(program("x", s.aggregate), texts, 0).models[0]
            for s in (fedavg.SYSTEM, fedex.SYSTEM)]  # fmt: skip
    gap = kernels(both[0])["query"] - kernels(both[1])["query"]
    assert np.abs(gap).max() > 1e-4


def test_frozen_factors_stay_and_a_core_stays_between_its_bases(texts):
    half = program("ffa", ffa.SYSTEM.aggregate, train="v", ranks=(2, 2, 2))
    first = rounds.start(half, texts, 0, 0)["layers/attention/query/kernel"]
    mean = LowRank(jnp.ones((D, 2)), jnp.full((2, D), 3.0))
    down = rounds.sent_down(half, mean, first)
    assert (down["u"] == first["u"]).all() and (down["v"] == 3.0).all()
    core = program("sb", fed_sb.SYSTEM.aggregate, train="core", ranks=(2, 2, 2))
    held = rounds.start(core, texts, 0, 0)["layers/attention/query/kernel"]
    moved = {**held, "core": held["core"] + jnp.arange(12.0).reshape(3, 2, 2)}
    bank = rounds.factors(moved)
    mean = fed_sb.SYSTEM.aggregate(bank, jnp.full(3, 1 / 3)).mean
    down = rounds.factors(rounds.sent_down(core, mean, moved))
    expected = np.mean([np.asarray(u) @ np.asarray(v) for u, v in zip(*bank, strict=True)], axis=0)
    for u, v in zip(*down, strict=True):
        np.testing.assert_allclose(np.asarray(u) @ np.asarray(v), expected, atol=1e-5)


def test_bytes_are_those_of_what_is_sent():
    sites = 4 * len(rounds.SITES)
    assert rounds.sent_up(program("x", None), D) == sites * 2 * D * 5 / 3
    assert rounds.sent_up(program("x", None, train="v", ranks=(2, 2)), D) == sites * D * 2
    assert rounds.sent_up(program("x", None, train="core", ranks=(3,)), D) == sites * 9


def test_private_gradients_are_clipped_per_row_and_noise_is_on_their_sum():
    rng = np.random.default_rng(1)
    grads = {"u": rng.normal(size=(5, 3, 2)), "v": rng.normal(size=(5, 4))}
    given = {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}
    norm = np.sqrt(sum((g.reshape(5, -1) ** 2).sum(1) for g in grads.values()))
    clip = float(np.median(norm))
    factor = np.minimum(1.0, clip / norm)
    found = rounds.privately(given, jnp.float32(clip), jnp.float32(0.0), jax.random.key(0))
    for k, g in grads.items():
        np.testing.assert_allclose(found[k], np.einsum("n,n...->...", factor, g) / 5, rtol=1e-4)
    noisy = jax.vmap(lambda k: rounds.privately(given, jnp.float32(clip), jnp.float32(2.0), k))(
        jax.random.split(jax.random.key(1), 1000)
    )
    spread = np.asarray(noisy["v"]).std(0)
    np.testing.assert_allclose(spread, 2.0 * clip / 5, rtol=0.12)


def test_a_private_round_without_noise_and_clip_is_a_plain_one(texts):
    plain = rounds.train(program("x", ffa.SYSTEM.aggregate, train="v", ranks=(2,) * 3), texts, 0)
    private = rounds.train(
        program("x", ffa.SYSTEM.aggregate, train="v", ranks=(2,) * 3, clip=1e6), texts, 0
    )
    for a, b in zip(*(kernels(t.models[0]).values() for t in (plain, private)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
