"""LaMDA++: ranks by NumPy's SVD, and ranks that are cut stay zero."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods import LaMDA

DECAYS = {"flat": 1.0, "steep": 0.3, "middle": 0.7}


def weight(decay, seed, d_in=8, d_out=6):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(d_in, 6)))
    v, _ = np.linalg.qr(rng.normal(size=(d_out, 6)))
    return jnp.asarray((u * decay ** np.arange(6)) @ v.T, jnp.float32)


@pytest.fixture(scope="module")
def world():
    """(fn, params, x, adapter): three single weights, and a stack of a flat and a steep one."""
    params = {name: weight(decay, n) for n, (name, decay) in enumerate(DECAYS.items())}
    params["stack"] = jnp.stack([weight(0.95, 7), weight(0.2, 8)])

    def fn(p, x):
        y = sum(x @ p[name] for name in DECAYS)
        return y + jax.lax.scan(lambda c, w: (c, x @ w), 0, p["stack"])[1].sum(0)

    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 8)), jnp.float32)
    adapter = jl.init(jax.random.key(0), fn, params, x, methods={".*": LaMDA(rank=5, alpha=5.0)})
    return fn, params, x, adapter


def check_order(world):
    _, params, _, adapter = world
    ranks = jl.inits.spectral_ranks(adapter, params, (1, 2, 3, 4, 5))
    energy = {}
    for path, w in params.items():
        for at, matrix in enumerate(np.asarray(w, np.float64).reshape(-1, 8, 6)):
            s = np.linalg.svd(matrix, compute_uv=False) ** 2
            energy[path, at] = s[:3].sum() / s.sum()
    falling = sorted(energy, key=lambda key: -energy[key])
    got = [int(ranks[path].reshape(-1)[at]) for path, at in falling]
    assert got == [1, 2, 3, 4, 5]


def test_the_most_concentrated_weight_gets_the_smallest_rank(world):
    check_order(world)


def test_mutation_another_order_is_seen(world, monkeypatch):
    module = importlib.import_module("jlora.inits.spectral_ranks")  # the name is the function's too
    good = module.concentration
    monkeypatch.setattr(module, "concentration", lambda w, rank: -good(w, rank))
    with pytest.raises(AssertionError):
        check_order(world)


def test_what_is_cut_stays_zero_and_the_start_is_the_identity(world):
    fn, params, x, adapter = world
    ranks = jl.inits.spectral_ranks(adapter, params, (2, 4))
    small = jl.inits.cut(adapter, ranks)
    tuned = jax.jit(jl.lift(fn))
    np.testing.assert_allclose(tuned(params, small, x), fn(params, x), atol=1e-5)

    def loss(t):
        return jnp.sum(jl.lift(fn)(params, small.replace(trainable=t), x) ** 2)

    grad = jax.jit(jax.grad(loss))
    moved = jax.tree.map(lambda t, g: t - 0.05 * g, small.trainable, grad(small.trainable))
    again = jax.tree.map(lambda t, g: t - 0.05 * g, moved, grad(moved))
    for path, kept in ranks.items():
        for at, rank in np.ndenumerate(kept):
            b, core = (np.asarray(again[path][name])[at] for name in ("b", "core"))
            assert not b[rank:].any() and not core[rank:].any() and not core[:, rank:].any()
            assert (
                b[:rank].any()
                and np.abs(core[:rank, :rank] - np.diag(np.diag(core)[:rank])).max() > 0
            )


def test_limit_one_level_is_one_rank(world):
    _, params, _, adapter = world
    ranks = jl.inits.spectral_ranks(adapter, params, (5,))
    jax.tree.map(
        np.testing.assert_array_equal, jl.inits.cut(adapter, ranks).trainable, adapter.trainable
    )


def test_refusals(world):
    fn, params, x, adapter = world
    with pytest.raises(ValueError, match="rising ranks"):
        jl.inits.spectral_ranks(adapter, params, (3, 2))
    with pytest.raises(ValueError, match="rank"):
        jl.inits.spectral_ranks(adapter, params, (2, 9))
    with pytest.raises(ValueError, match="flat: ranks"):
        jl.inits.cut(adapter, {"flat": np.array(6)})
    lora = jl.init(jax.random.key(0), fn, params, x, methods={"flat": jl.LoRA(rank=2)})
    with pytest.raises(ValueError, match="got LoRA, expected LaMDA"):
        jl.inits.cut(lora, {"flat": np.array(1)})
