"""Routed experts: the mixture token by token, equal back-ends, what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed.experts import Experts
from jlora.routing import dispatch
from jlora.routing.bias_balanced import BiasBalanced
from jlora.routing.capacity import Capacity
from jlora.routing.state import advance
from jlora.routing.top_one import TopOne

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


# --- other rules, and layers with fewer experts -------------------------------------------------


def test_capacity_drops_choices_and_says_how_many(bench):
    """One expert takes two tokens at most; a dropped token passes through the base alone."""
    method = Experts(4, 2, 3, 6.0, rule=Capacity(TopOne(), 2))
    adapter = bench.noisy(method)
    y, aux = bench.forward(adapter, aux=True)
    report = {k: np.asarray(t) for k, t in aux["w"].items()}
    assert report["counts"].max() == 2 and report["dropped"] > 0.4
    assert report["counts"].sum() == pytest.approx(15 * (1 - report["dropped"]))
    same = np.isclose(y, bench.x @ bench.params["w"], atol=1e-6).all(-1)
    assert same.sum() == 15 - report["counts"].sum()


def test_a_rule_with_a_state_moves_by_advance(bench):
    rule = BiasBalanced(2, rate=0.05)
    adapter = bench.noisy(Experts(4, 2, 3, 6.0, rule=rule))
    _, aux = bench.forward(adapter, aux=True)
    after = advance(adapter, aux).frozen["w"]["bias"]
    np.testing.assert_allclose(after, 0.05 * np.sign(0.25 - aux["w"]["load"]), rtol=1e-5)


LAYERS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4)) / 2, jnp.float32)}
TOKENS = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def looped(params, x):
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x


def test_fewer_experts_in_some_layers_are_a_loop_over_layers_of_their_own():
    """MoLA's counts in one scan: value, gradient and reports of unpadded layers."""
    counts = (2, 3)
    method = Experts(experts=3, top_k=2, rank=2, counts=counts)
    padded = jl.init(jax.random.key(0), scanned, LAYERS, TOKENS, methods={"w": method})
    move = lambda t: t + jnp.asarray(np.random.default_rng(2).normal(size=t.shape) / 2, t.dtype)  # noqa: E731
    padded = padded.replace(trainable=jax.tree.map(move, padded.trainable))
    apart = {"w": list(LAYERS["w"])}
    methods = {f"w/{n}": Experts(experts=e, top_k=2, rank=2) for n, e in enumerate(counts)}
    ragged = jl.init(jax.random.key(0), looped, apart, TOKENS, methods=methods)

    def cut(tree):  # the arrays of a stack, without the experts that a layer does not have
        p = tree["w"]
        return {
            f"w/{n}": {"a": p["a"][n, :e], "b": p["b"][n, :e], "router": p["router"][n, :, :e]}
            for n, e in enumerate(counts)
        }

    def loss(trainable, adapter, fn, params):
        y, aux = jl.lift(fn, aux=True)(params, adapter.replace(trainable=trainable), TOKENS)
        return jnp.sum(y**2) + sum(jnp.sum(r["balance"]) for r in aux.values()), (y, aux)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (_, (y, aux)), grad = run(padded.trainable, padded, scanned, LAYERS)
    (_, (z, own)), want = run(cut(padded.trainable), ragged, looped, apart)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)
    for path, arrays in want.items():
        for name, g in arrays.items():
            np.testing.assert_allclose(cut(grad)[path][name], g, rtol=1e-4, atol=1e-6)
    for n, e in enumerate(counts):
        np.testing.assert_allclose(aux["w"]["balance"][n], own[f"w/{n}"]["balance"], rtol=1e-5)
        np.testing.assert_allclose(aux["w"]["load"][n, :e], own[f"w/{n}"]["load"], rtol=1e-5)
        assert not np.any(aux["w"]["load"][n, e:])


def test_what_counts_are_refused():
    with pytest.raises(ValueError, match=r"Experts\.counts: got \(1, 2\), expected in 2\.\.4"):
        Experts(experts=4, counts=(1, 2))
    with pytest.raises(ValueError, match="with counts, expected no state"):
        Experts(experts=4, counts=(2, 4), rule=BiasBalanced())
    with pytest.raises(ValueError, match=r"w: got 3 numbers, expected one per layer of the stack"):
        method = Experts(experts=4, counts=(2, 4, 3))
        jl.init(jax.random.key(0), scanned, LAYERS, TOKENS, methods={"w": method})
