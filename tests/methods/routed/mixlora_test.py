"""MixLoRA: what its router reports, experts of other methods, what is refused.

Values of a block against a loop over merged experts are in tests/core/block_test.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import mixlora
from jlora.methods.routed.mixlora import MixLoRA


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS = {"gate": leaf(4, 6), "down": leaf(6, 4, seed=1)}
X = leaf(5, 4, seed=2)


def ffn(h, w):
    return jnp.tanh(h @ w["gate"]) @ w["down"]


def model(p, x):
    return jl.block("block", ffn)(x, p)


def adapter(method, noise=0.5):
    made = jl.init(jax.random.key(0), model, PARAMS, X, methods={"gate|down": method})
    rng = np.random.default_rng(3)
    move = lambda t: t + jnp.asarray(noise * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return made.replace(trainable=jax.tree.map(move, made.trainable))


def gates(made, top):
    """softmax over the `top` largest logits of each token, in float64."""
    logits = np.asarray(X, np.float64) @ np.asarray(made.trainable["gate"]["router"], np.float64)
    kept = np.where(logits >= np.sort(logits, -1)[:, -top, None], np.exp(logits), 0)
    return logits, kept / kept.sum(-1, keepdims=True)


def test_the_router_reports_its_load_and_balance_once():
    made = adapter(MixLoRA(jl.LoRA(2), experts=3, top_k=2))
    _, aux = jl.lift(model, aux=True)(PARAMS, made, X)
    assert aux.keys() == {"block"}
    logits, kept = gates(made, 2)
    load = (kept > 0).mean(0) / 2
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(aux["block"]["load"], load, rtol=1e-5)
    np.testing.assert_allclose(aux["block"]["balance"], 3 * (load * prob.mean(0)).sum(), rtol=1e-5)


def of_expert(tree, e):
    """The arrays of expert e by the names of its method."""
    own = {path: [k for k in arrays if k.startswith("expert_")] for path, arrays in tree.items()}
    return {path: {k[7:]: tree[path][k][e] for k in names} for path, names in own.items()}


def loop(made, method, top):
    """Expert by expert: an adapter of `method`, merged into the weights."""
    sites = tuple((site, method) for site, _ in made.sites)
    _, weights = gates(made, top)
    total = 0.0
    for e in range(weights.shape[-1]):
        one = jl.Adapter(of_expert(made.trainable, e), of_expert(made.frozen, e), sites)
        total += weights[:, e, None] * np.asarray(ffn(X, jl.merge(PARAMS, one)))
    return total


@pytest.mark.parametrize("method", [jl.LoRA(2, alpha=3.0), jl.DoRA(2), jl.OFT(block=2)])
def test_experts_may_be_of_any_method(method):
    made = adapter(MixLoRA(method, experts=3, top_k=2))
    np.testing.assert_allclose(
        jl.lift(model)(PARAMS, made, X), loop(made, method, 2), rtol=1e-4, atol=1e-5
    )


def test_one_expert_is_its_method_and_a_fresh_adapter_is_the_base():
    made = adapter(MixLoRA(jl.LoRA(2), experts=1, top_k=1))
    want = loop(made, jl.LoRA(2), 1)
    np.testing.assert_allclose(jl.lift(model)(PARAMS, made, X), want, rtol=1e-4, atol=1e-5)
    fresh = adapter(MixLoRA(jl.LoRA(2), experts=3), noise=0.0)
    np.testing.assert_allclose(jl.lift(model)(PARAMS, fresh, X), model(PARAMS, X), rtol=1e-5)


def test_ranks_of_a_bank_may_differ():
    bank = jl.stack([adapter(MixLoRA(jl.LoRA(r), experts=3)) for r in (2, 3)])
    got = jax.vmap(lambda a: jl.lift(model)(PARAMS, a, X))(bank)
    want = [jl.lift(model)(PARAMS, adapter(MixLoRA(jl.LoRA(r), experts=3)), X) for r in (2, 3)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-4, atol=1e-5)


def test_mutation_a_router_that_is_not_normalised_is_seen(monkeypatch):
    made = adapter(MixLoRA(jl.LoRA(2), experts=3, top_k=2))
    top_k = mixlora.router.top_k

    def raw(logits, k):
        return top_k(logits, k)._replace(weights=jnp.ones_like(top_k(logits, k).weights))

    monkeypatch.setattr(mixlora.router, "top_k", raw)
    got = jl.lift(model)(PARAMS, made, X)
    assert not np.allclose(got, loop(made, jl.LoRA(2), 2), rtol=1e-2)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"MixLoRA.top_k: got 4, expected 1..3"):
        MixLoRA(jl.LoRA(2), experts=3, top_k=4)
    none = adapter(MixLoRA(jl.LoRA(2), router="none"))
    with pytest.raises(ValueError, match="no site of block 'block' matches 'none'"):
        jl.lift(model)(PARAMS, none, X)
    made = adapter(MixLoRA(jl.LoRA(2), experts=3))

    def flat(p, x):  # the block returns other tokens than its router saw
        return jl.block("block", lambda h, w: ffn(h, w).sum(0))(x, p)

    with pytest.raises(ValueError, match=r"the router saw tokens \(5,\), got outputs \(4,\)"):
        jl.lift(flat)(PARAMS, made, X)
    assert dataclasses.replace(made.sites[0][1], top_k=1).top_k == 1


SPARSE = [("dense", 1), ("gather", 2)]


@pytest.mark.parametrize(("backend", "top"), SPARSE)
def test_sparse_is_the_sum_over_merged_experts_too(backend, top):
    method = jl.LoRA(2, alpha=3.0)
    made = adapter(MixLoRA(method, experts=4, top_k=top, sparse=True, backend=backend))
    got = jl.lift(model)(PARAMS, made, X)
    np.testing.assert_allclose(got, loop(made, method, top), rtol=1e-4, atol=1e-5)


def as_dense(made):
    """The same arrays, every expert on every token."""
    sites = tuple((site, dataclasses.replace(m, sparse=False)) for site, m in made.sites)
    return jl.Adapter(made.trainable, made.frozen, sites)


def test_sparse_and_dense_have_equal_gradients_and_reports():
    def loss(trainable, made, p, x):
        y, aux = jl.lift(model, aux=True)(p, made.replace(trainable=trainable), x)
        return jnp.sum(y**3) + aux["block"]["balance"], aux

    made = adapter(MixLoRA(jl.LoRA(2), experts=4, top_k=2, sparse=True, backend="gather"))
    grad = jax.grad(loss, (0, 2, 3), has_aux=True)
    got, want = (grad(m.trainable, m, PARAMS, X) for m in (made, as_dense(made)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(got[0][0]))


def test_sparse_needs_top_k_bodies_and_dense_as_many_as_experts():
    width, experts = 64, 8
    p = {"gate": leaf(width, 2 * width), "down": leaf(2 * width, width)}
    x = leaf(32, width)
    init = lambda **how: jl.init(  # noqa: E731
        jax.random.key(0), model, p, x,
        methods={"gate|down": MixLoRA(jl.LoRA(2), experts=experts, top_k=2, **how)},
    )  # fmt: skip

    def flops(made):
        return jax.jit(jl.lift(model)).lower(p, made, x).compile().cost_analysis()["flops"]

    one = 2 * 32 * 2 * width * width  # of a matmul of the base
    dense, sparse = flops(init()), flops(init(sparse=True))
    assert dense > (1 + experts) * one  # the first matmul of the base is done once
    assert (1 + 2) * one < sparse < 0.5 * dense


def test_what_sparse_refuses():
    with pytest.raises(ValueError, match=r"MixLoRA.sparse: got experts of DoRA"):
        MixLoRA(jl.DoRA(2), sparse=True)
    with pytest.raises(ValueError, match=r"MixLoRA.sparse: got experts of LoRA.*without dropout"):
        MixLoRA(jl.LoRA(2, dropout=0.1), sparse=True)
    with pytest.raises(ValueError, match=r"MixLoRA.backend: got 'ragged', expected one of"):
        MixLoRA(jl.LoRA(2), sparse=True, backend="ragged")
    late = adapter(MixLoRA(jl.LoRA(2), experts=3, router="down", sparse=True))
    with pytest.raises(ValueError, match="expected the router at the first weight"):
        jl.lift(model)(PARAMS, late, X)

    def mixes(p, x):  # its second matmul has other tokens
        return jl.block("block", lambda h, w: (h @ w["gate"])[:2] @ w["down"])(x, p)

    made = adapter(MixLoRA(jl.LoRA(2), experts=3, sparse=True))
    with pytest.raises(ValueError, match=r"the router saw tokens \(5,\), got \(2,\)"):
        jl.lift(mixes)(PARAMS, made, X)
