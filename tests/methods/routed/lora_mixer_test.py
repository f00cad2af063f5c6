"""LoRA-Mixer: the value of three regimes, router training, both signs, projections of an SSM."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import lora_mixer
from jlora.methods.routed.lora_mixer import LoRAMixer, anchor, in_regime
from jlora.routing.losses import specialisation

METHOD = LoRAMixer(experts=4, rank=2, alpha=3.0, top_k=2)
LABELS = jnp.asarray(np.random.default_rng(3).integers(-1, 4, (3, 5)), jnp.int32)


def check(bench, regime):
    adapter = in_regime(bench.noisy(METHOD), regime)
    p = bench.numbers(adapter)
    x = np.asarray(bench.x, np.float64).reshape(-1, 12)
    logits = x @ p["router"]
    g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if regime == "sparse":
        g = np.where(g >= np.sort(g, -1)[:, -2, None], g, 0)
        g = g / g.sum(-1, keepdims=True)
    if regime == "hard":
        g = (np.asarray(LABELS).reshape(-1, 1) == np.arange(4)).astype(float)
    want = x @ bench.w
    for e in range(4):
        want += 1.5 * g[:, e, None] * (x @ p["a"][e] @ p["b"][e])
    got = jl.lift(bench.model)(bench.params, adapter, bench.x, ctx={"labels": LABELS})
    np.testing.assert_allclose(np.reshape(got, (-1, 8)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("regime", ["hard", "soft", "sparse"])
def test_value(bench, regime):
    check(bench, regime)


def test_limit_one_expert_is_lora(bench):
    adapter = bench.noisy(LoRAMixer(experts=1, top_k=1, rank=3, alpha=6.0))
    p = bench.numbers(adapter)
    want = np.asarray(bench.x, np.float64) @ (bench.w + 2.0 * p["a"][0] @ p["b"][0])
    np.testing.assert_allclose(bench.forward(adapter), want, rtol=1e-4, atol=1e-4)


def test_reports(bench):
    adapter = bench.noisy(METHOD)
    _, aux = bench.forward(adapter, aux=True)
    logits = np.asarray(bench.x, "f8").reshape(-1, 12) @ bench.numbers(adapter)["router"]
    soft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    share = np.bincount(np.argsort(-logits)[:, :2].ravel(), minlength=4) / 30
    report = aux["w"]
    np.testing.assert_allclose(report["balance"], 4 * share @ soft.mean(0), rtol=1e-5)
    np.testing.assert_allclose(report["entropy"], -(soft * np.log(soft)).sum(-1).mean(), rtol=1e-5)
    for sign in (-1, 1):
        got = specialisation(report["balance"], report["entropy"], 4, 2.0, 0.5, sign)
        want = 2 * share @ soft.mean(0) - sign * 0.5 * (soft * np.log(soft)).sum(-1).mean()
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_hard_regime_trains_the_expert_of_the_label_alone(bench):
    adapter = in_regime(bench.noisy(METHOD), "hard")
    ctx = {"labels": jnp.full((3, 5), 2, jnp.int32)}

    def loss(t):
        tuned = jl.lift(bench.model)
        return jnp.sum(tuned(bench.params, adapter.replace(trainable=t), bench.x, ctx=ctx) ** 2)

    grad = jax.grad(loss)(adapter.trainable)["w"]
    assert np.any(grad["a"][2]) and not np.any(grad["router"])
    assert not np.any(np.delete(np.asarray(grad["a"]), 2, axis=0))


def test_router_training_leaves_frozen_experts_and_both_signs_do_as_they_say(bench):
    frozen = dataclasses.replace(METHOD, train_experts=False)
    start = bench.noisy(frozen)
    assert start.trainable["w"].keys() == {"router"}
    run = jl.lift(bench.model, aux=True)

    def reports(t):
        return run(bench.params, start.replace(trainable=t), bench.x)[1]["w"]

    def moved(sign):
        def loss(t):
            return specialisation(reports(t)["balance"], reports(t)["entropy"], 4, 1, 1, sign)

        return jax.tree.map(
            lambda a, g: a - 0.5 * g, start.trainable, jax.grad(loss)(start.trainable)
        )

    flat, sharp = (reports(moved(sign))["entropy"] for sign in (-1, 1))
    assert flat > reports(start.trainable)["entropy"] > sharp


def test_the_anchor_is_of_experts_alone():
    one = {"w": {"a": jnp.ones((2, 3)), "b": jnp.zeros(2), "router": jnp.ones(4)}}
    two = {"w": {"a": jnp.full((2, 3), 3.0), "b": jnp.ones(2), "router": jnp.zeros(4)}}
    assert anchor(one, one) == 0 and anchor(two, one) == 26
    assert not np.any(jax.grad(anchor)(one, one)["w"]["a"])


def test_projections_of_a_state_space_model():
    """In and out of a linear recurrence, token by token inside the scan over time."""
    rng = np.random.default_rng(0)
    leaf = lambda *s: jnp.asarray(rng.normal(size=s) / 2, jnp.float32)  # noqa: E731
    params, x = {"in": leaf(4, 6), "out": leaf(6, 4)}, leaf(7, 4)

    def model(p, x):
        def step(state, token):
            state = 0.5 * state + token @ p["in"]
            return state, state @ p["out"]

        return jax.lax.scan(step, jnp.zeros(6), x)[1]

    adapter = jl.init(jax.random.key(0), model, params, x, methods={"in|out": METHOD})
    move = lambda t: t + leaf(*t.shape)  # noqa: E731
    adapter = adapter.replace(trainable=jax.tree.map(move, adapter.trainable))
    got = jl.lift(model)(params, adapter, x)

    def project(v, path):
        p = {k: np.asarray(t, "f8") for k, t in adapter.trainable[path].items()}
        g = np.exp(v @ p["router"])
        part = sum(g[e] / g.sum() * v @ p["a"][e] @ p["b"][e] for e in range(4))
        return v @ np.asarray(params[path], "f8") + 1.5 * part

    state = np.zeros(6)
    for t, token in enumerate(np.asarray(x, np.float64)):
        state = 0.5 * state + project(token, "in")
        np.testing.assert_allclose(got[t], project(state, "out"), rtol=1e-3, atol=1e-4)


def test_refusals(bench):
    with pytest.raises(ValueError, match=r"LoRAMixer\.top_k: got 5, expected 1\.\.4"):
        LoRAMixer(experts=4, top_k=5)
    with pytest.raises(ValueError, match=r"LoRAMixer\.regime: got 'warm'"):
        LoRAMixer(regime="warm")
    with pytest.raises(ValueError, match=r"hard regime: got no ctx\['labels'\]"):
        bench.forward(in_regime(bench.fresh(METHOD), "hard"))


def test_mutation_a_sparse_mixture_in_the_soft_regime_is_seen(bench, monkeypatch):
    softmax = jax.nn.softmax
    monkeypatch.setattr(lora_mixer.jax.nn, "softmax", lambda t, axis: softmax(9 * t, axis=axis))
    with pytest.raises(AssertionError):
        check(bench, "soft")
