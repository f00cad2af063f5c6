"""Routed experts: the mixture token by token, equal back-ends, what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed.experts import Experts
from jlora.routing import dispatch

METHOD = Experts(experts=4, top_k=2, rank=3, alpha=6.0)


def expected(bench, p, k=2):
    x = np.asarray(bench.x, np.float64).reshape(-1, 12)
    out = x @ bench.w
    for t, row in enumerate(x):
        logits = row @ p["router"]
        best = np.argsort(-logits, kind="stable")[:k]
        g = np.exp(logits[best] - logits[best].max())
        for weight, e in zip(g / g.sum(), best, strict=True):
            out[t] += p["scale"] * weight * row @ p["a"][e] @ p["b"][e]
    return out.reshape(3, 5, 8)


def check_value(bench, backend):
    adapter = bench.noisy(Experts(4, 2, 3, 6.0, backend))
    want = expected(bench, bench.numbers(adapter))
    np.testing.assert_allclose(bench.forward(adapter), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_value(bench, backend):
    check_value(bench, backend)


@pytest.mark.parametrize("backend", dispatch.BACKENDS[1:])
def test_backends_have_equal_gradients(bench, backend):
    def loss(trainable, method):
        adapter = bench.noisy(method).replace(trainable=trainable)
        return jnp.sum(bench.forward(adapter) ** 2)

    start = bench.noisy(METHOD).trainable
    want = jax.grad(loss)(start, METHOD)["w"]
    got = jax.grad(loss)(start, Experts(4, 2, 3, 6.0, backend))["w"]
    for name in want:
        assert np.any(want[name])
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-3)


def test_reports_come_back_through_aux(bench):
    adapter = bench.noisy(METHOD)
    _, aux = bench.forward(adapter, aux=True)
    logits = np.asarray(bench.x, np.float64).reshape(-1, 12) @ bench.numbers(adapter)["router"]
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[:, :2]
    load = np.bincount(chosen.reshape(-1), minlength=4) / chosen.size
    np.testing.assert_allclose(aux["w"]["load"], load, rtol=1e-5)
    np.testing.assert_allclose(aux["w"]["balance"], 4 * load @ soft.mean(0), rtol=1e-5)


def test_limit_one_expert_is_lora(bench):
    adapter = bench.noisy(Experts(experts=1, top_k=1, rank=3, alpha=3.0))
    p = bench.numbers(adapter)
    want = np.asarray(bench.x, np.float64) @ (bench.w + p["a"][0] @ p["b"][0])
    np.testing.assert_allclose(bench.forward(adapter), want, rtol=1e-4, atol=1e-4)


def test_there_is_no_merged_weight(bench):
    with pytest.raises(NotImplementedError, match="Experts has no merge"):
        jl.merge(bench.params, bench.fresh(METHOD))


def test_refusals():
    with pytest.raises(ValueError, match=r"Experts.top_k: expected in 1\.\.4, got 5"):
        Experts(experts=4, top_k=5)
    with pytest.raises(ValueError, match=r"Experts\.backend: expected one of"):
        Experts(backend="magic")


def test_mutation_unweighted_experts_are_seen(bench, monkeypatch):
    good = dispatch.dispatch
    monkeypatch.setattr(
        dispatch, "dispatch", lambda x, a, b, i, w, k: good(x, a, b, i, w * 0 + w.mean(), k)
    )
    with pytest.raises(AssertionError):
        check_value(bench, "dense")


def test_a_shared_decision_is_that_of_equal_routers():
    """One router for two sites: the value of two equal ones, and the sum of their gradients."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    params = {"q": 0.3 * jnp.ones((6, 4)), "v": 0.2 * jnp.ones((6, 4))}
    model = lambda p, x: jnp.tanh(x @ p["q"]) + x @ p["v"]  # noqa: E731

    def adapter(**shared):
        method = Experts(3, 2, 2, **shared)
        made = jl.init(jax.random.key(0), model, params, x, methods={"q|v": method})
        noise = {k: 0.1 + 0.01 * t for k, t in made.trainable["q"].items()}
        move = lambda path: {k: t + noise[k] for k, t in made.trainable[path].items()}  # noqa: E731
        return made.replace(trainable={path: move(path) for path in made.trainable})

    one, two = adapter(decision="block", router="q"), adapter()
    router = one.trainable["q"]["router"]
    assert "router" not in one.trainable["v"]
    assert all(two.trainable[p]["router"].shape == router.shape for p in "qv")

    def loss(trainable, made):
        return jnp.sum(jl.lift(model)(params, made.replace(trainable=trainable), x) ** 2)

    same = {p: arrays | {"router": router} for p, arrays in one.trainable.items()}
    got, g = jax.value_and_grad(loss)(one.trainable, one)
    want, h = jax.value_and_grad(loss)(same, two)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    total = h["q"]["router"] + h["v"]["router"]
    np.testing.assert_allclose(g["q"]["router"], total, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no site before this one decided 'block'"):
        jl.lift(lambda p, x: x @ p["v"] + x @ p["q"])(params, one, x)
