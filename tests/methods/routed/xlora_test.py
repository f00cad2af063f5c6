"""X-LoRA: the value, one-hot scalings, two passes, layers, where gradients go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import xlora
from jlora.methods.routed.expert_bank import with_experts
from jlora.methods.routed.xlora import XLoRA, two_pass

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(3, 5, 4)), jnp.float32)
METHOD = XLoRA(experts=3, hidden=4, rank=2, alpha=3.0, train_experts=True)
FORMS = [
    METHOD,
    dataclasses.replace(METHOD, width=6, temperature=2.0, strength=0.5),
    dataclasses.replace(METHOD, top_k=2),
    dataclasses.replace(METHOD, softmax=False),
]


def run(bench, adapter):
    return jl.lift(bench.model, aux=True)(bench.params, adapter, bench.x, ctx={"hidden": HIDDEN})


def check(bench, method):
    adapter = bench.noisy(method)
    p = bench.numbers(adapter)
    for path in adapter.trainable.keys() - {"w"}:  # what all sites share
        p |= {k: np.asarray(t, np.float64) for k, t in adapter.trainable[path].items()}
    h = np.asarray(HIDDEN, np.float64).reshape(-1, 4)
    if method.width:
        h = np.maximum(h @ p["inner"] + p["inner_bias"], 0)
    s = (h @ p["head"] + p["head_bias"]) / method.temperature
    if method.softmax:
        s = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    if method.top_k:
        s = np.where(s >= np.sort(s, -1)[:, -method.top_k, None], s, 0)
    x = np.asarray(bench.x, np.float64).reshape(-1, 12)
    want = x @ bench.w
    for k in range(3):
        want += method.strength * 1.5 * s[:, k, None] * (x @ p["a"][k] @ p["b"][k])
    y, aux = run(bench, adapter)
    np.testing.assert_allclose(np.reshape(y, (-1, 8)), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux["w"]["scalings"], s.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", FORMS, ids=["linear", "mlp", "top 2", "raw"])
def test_value(bench, method):
    check(bench, method)


def test_one_hot_scalings_are_that_adapter_and_none_the_base(bench):
    loras = [bench.noisy(jl.LoRA(rank=2, alpha=2.0), seed=s) for s in range(3)]
    mixed = with_experts(bench.fresh(XLoRA(experts=3, hidden=4, rank=2, softmax=False)), loras)

    def forced(row):
        head = {"head": jnp.zeros((4, 3)), "head_bias": jnp.asarray(row, jnp.float32)}
        return run(bench, mixed.replace(trainable={"w": head}))[0]

    for k in range(3):
        want = bench.forward(loras[k])
        np.testing.assert_allclose(forced(np.eye(3)[k]), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(forced([0, 0, 0]), bench.x @ bench.params["w"], rtol=1e-6)


# --- two layers in a scan, whose adapters differ ------------------------------------------------

PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, 4, 4)) / 2, jnp.float32)}
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


def model(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def layered(method):
    return jl.init(jax.random.key(0), model, PARAMS, X, methods={"w": method})


def test_two_passes_reach_each_layer_with_its_own_scalings():
    mixed = layered(XLoRA(experts=2, hidden=4, rank=2, train_experts=True))
    move = lambda t: t + jnp.asarray(RNG.normal(size=t.shape) / 2, t.dtype)  # noqa: E731
    mixed = mixed.replace(trainable=jax.tree.map(move, mixed.trainable))
    got = two_pass(model, model)(PARAMS, mixed, X)
    p = {k: np.asarray(t, np.float64) for k, t in mixed.trainable["w"].items()}
    w = np.asarray(PARAMS["w"], np.float64)
    h, y = np.asarray(X, np.float64), np.asarray(X, np.float64)
    for n in range(2):
        h = np.tanh(h @ w[n])
    for n in range(2):
        s = np.exp(h @ p["head"][n] + p["head_bias"][n])
        s /= s.sum(-1, keepdims=True)
        delta = sum(s[:, k, None] * (y @ p["a"][n, k] @ p["b"][n, k]) for k in range(2))
        y = np.tanh(y @ w[n] + 8.0 * delta)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_gradients_are_in_the_classifier_alone():
    loras = []
    for seed in range(2):
        made = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"w": jl.LoRA(2)})
        loras.append(made.replace(trainable=jax.tree.map(lambda t: t + 0.3, made.trainable)))
    mixed = with_experts(layered(XLoRA(experts=2, hidden=4, rank=2, width=3)), loras)
    assert {k for arrays in mixed.trainable.values() for k in arrays} == {
        *("head", "head_bias", "inner", "inner_bias"),
    }
    tuned = two_pass(model, model)
    loss = lambda t, h: jnp.sum(  # noqa: E731
        jl.lift(model)(PARAMS, mixed.replace(trainable=t), X, ctx={"hidden": h}) ** 2
    )
    by_trained, by_hidden = jax.grad(loss, (0, 1))(mixed.trainable, model(PARAMS, X))
    assert all(np.any(g) for g in jax.tree.leaves(by_trained)) and not np.any(by_hidden)
    first = jax.grad(lambda x: jnp.sum(tuned(PARAMS, mixed, x)))(X)
    assert np.any(first)  # the second pass is differentiable


def test_refusals(bench):
    adapter = bench.fresh(METHOD)
    with pytest.raises(ValueError, match=r"XLoRA: got no ctx\['hidden'\]"):
        bench.forward(adapter)
    with pytest.raises(ValueError, match=r"got \(3, 5, 2\), expected \[\.\.\., 4\]"):
        jl.lift(bench.model)(bench.params, adapter, bench.x, ctx={"hidden": HIDDEN[..., :2]})
    for name, value in {"top_k": 4, "width": -1, "temperature": 0, "hidden": 0}.items():
        with pytest.raises(ValueError, match=rf"XLoRA\.{name}: got {value}"):
            dataclasses.replace(METHOD, **{name: value})


def test_mutation_renormalised_scalings_are_seen(bench, monkeypatch):
    good = xlora.dispatch.mixed
    scaled = lambda x, a, b, g: good(x, a, b, 1.5 * g / g.sum(-1, keepdims=True))  # noqa: E731
    monkeypatch.setattr(xlora.dispatch, "mixed", scaled)
    with pytest.raises(AssertionError):
        check(bench, FORMS[2])
