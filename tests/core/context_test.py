"""Side inputs and outputs: keys a site and a step, ctx, aux through scan, remat and cond."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.core.lazy import SIDE, Lazy
from jlora.core.scope import Scope


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Told(jl.LoRA):
    """Reports its input and its key; adds a side input."""

    def apply(self, x, w, p, ctx):
        report = {"sum": jnp.sum(x)}
        if "key" in ctx:
            report["draw"] = jax.random.uniform(ctx["key"])
        y = super().apply(x, w, {**p}, {})
        return (y + ctx["shift"] if "shift" in ctx else y), report


PARAMS = {"stack": leaf(3, 4, 4), "one": leaf(4, 4, seed=1)}
X = leaf(2, 4, seed=2)


def fn(p, x):
    h = jnp.tanh(x @ p["one"])
    h, _ = lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), h, p["stack"])
    h = lax.cond(h[0, 0] > 5, lambda h: h, lambda h: jnp.tanh(h @ p["one"]), h)
    return h @ p["one"]


def adapter(method):
    return jl.init(jax.random.key(0), fn, PARAMS, X, methods={"stack|one": method})


def test_reports():
    y, aux = jax.jit(lambda a: jl.lift(fn, aux=True)(PARAMS, a, X))(adapter(Told(2)))
    assert set(aux) == {"one", "stack", "one#2", "one#3"}
    assert aux["stack"]["sum"].shape == (3,) and aux["one"]["sum"].shape == ()
    h = jnp.tanh(X @ PARAMS["one"])
    np.testing.assert_allclose(aux["one"]["sum"], X.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["stack"]["sum"][0], h.sum(), rtol=1e-5)
    np.testing.assert_allclose(y, fn(PARAMS, X), rtol=1e-5, atol=1e-6)


def test_a_branch_not_taken_reports_zero():
    def branchy(p, x):
        return lax.cond(x[0, 0] > 9, lambda x: x @ p["one"], lambda x: x, x)

    a = jl.init(jax.random.key(0), branchy, PARAMS, X, methods={"one": Told(2)})
    _, aux = jl.lift(branchy, aux=True)(PARAMS, a, X)
    assert float(aux["one"]["sum"]) == 0
    _, aux = jl.lift(branchy, aux=True)(PARAMS, a, X + 10)
    np.testing.assert_allclose(aux["one"]["sum"], (X + 10).sum(), rtol=1e-6)


def test_keys_differ_by_site_use_and_step():
    run = jax.jit(lambda a, key: jl.lift(fn, aux=True)(PARAMS, a, X, ctx={"key": key})[1])
    aux = run(adapter(Told(2)), jax.random.key(5))
    draws = np.concatenate([np.ravel(r["draw"]) for r in aux.values()])
    assert draws.size == 6 and np.unique(draws).size == 6
    again = run(adapter(Told(2)), jax.random.key(5))
    chex.assert_trees_all_equal(aux, again)
    other = run(adapter(Told(2)), jax.random.key(6))
    assert not np.intersect1d(draws, np.ravel(other["stack"]["draw"])).size


def test_keys_differ_between_two_scans_and_experts():
    def twice(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
        return jnp.einsum("ebd,edf->ebf", jnp.stack([h, h, h]), p["stack"])

    a = jl.init(jax.random.key(0), twice, PARAMS, X, methods={"stack": Told(2)})
    _, aux = jl.lift(twice, aux=True)(PARAMS, a, X, ctx={"key": jax.random.key(5)})
    assert set(aux) == {"stack", "stack#2", "stack#3"}
    draws = np.concatenate([np.ravel(r["draw"]) for r in aux.values()])
    assert draws.size == 9 and np.unique(draws).size == 9


def test_side_inputs_have_gradients_through_scan():
    def loss(shift):
        y, _ = jl.lift(fn, aux=True)(PARAMS, a, X, ctx={"shift": shift})
        return jnp.sum(y)

    a = adapter(Told(2))
    loss, e = jax.jit(loss), 1e-2
    g = jax.grad(loss)(0.1)
    np.testing.assert_allclose(g, (loss(0.1 + e) - loss(0.1 - e)) / (2 * e), rtol=2e-2)


def test_reports_under_vmap_and_experts_have_the_stack_in_front():
    def experts(p, x):
        return jnp.einsum("etd,edf->etf", x, p["stack"])

    x = leaf(3, 2, 4)
    a = jl.init(jax.random.key(0), experts, PARAMS, x, methods={"stack": Told(2)})
    _, aux = jl.lift(experts, aux=True)(PARAMS, a, x)
    np.testing.assert_allclose(aux["stack"]["sum"], x.sum((1, 2)), rtol=1e-5, atol=1e-6)
    bank = jl.stack([a, a])
    _, aux = jax.vmap(lambda a: jl.lift(experts, aux=True)(PARAMS, a, x))(bank)
    assert aux["stack"]["sum"].shape == (2, 3)


@dataclasses.dataclass(frozen=True)
class Gated(jl.LoRA):
    """The delta times ctx["gate"], of the site and layer."""

    def apply(self, x, w, p, ctx):
        return x @ w + ctx["gate"] * (x @ p["a"] @ p["b"])


@dataclasses.dataclass(frozen=True)
class Numbered(jl.LoRA):
    """The delta times 1 + the index of the layer."""

    indexed: ClassVar[bool] = True

    def apply(self, x, w, p, ctx):
        return x @ w + (1 + ctx["index"]).astype(x.dtype) * (x @ p["a"] @ p["b"])


LAYERS = {"q": leaf(3, 4, 4, seed=3), "v": leaf(3, 4, 4, seed=4)}


def layer(h, w):
    return h + jnp.tanh(h @ w["q"]) @ w["v"]


def scanned(p, x):
    return lax.scan(lambda h, w: (layer(h, w), None), x, p)[0]


def rematted(p, x):
    return lax.scan(jax.checkpoint(lambda h, w: (layer(h, w), None)), x, p)[0]


def unrolled(p, x):
    for i in range(3):
        x = layer(x, {name: w[i] for name, w in p.items()})
    return x


def noisy(method, params=LAYERS, fn=scanned, sites="q|v"):
    fresh = jl.init(jax.random.key(0), fn, params, X, methods={sites: method})
    rng = np.random.default_rng(5)
    move = lambda t: t + jnp.asarray(rng.normal(size=t.shape) / 3, t.dtype)  # noqa: E731
    return fresh.replace(trainable=jax.tree.map(move, fresh.trainable))


def by_hand(trainable, gates, x):
    """Each layer merged with its own gate, in a loop."""
    for i in range(3):
        w = {}
        for name, base in LAYERS.items():
            p = trainable[name]
            w[name] = base[i] + gates[name][i] * (p["a"][i] @ p["b"][i])
        x = layer(x, w)
    return x


def gradients(run, *args):
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(run(*a) ** 2), tuple(range(len(args)))))(
        *args
    )


def same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-4, atol=1e-5), got, want)


GATES = {"q": jnp.asarray([0.5, -1.0, 2.0]), "v": jnp.asarray([1.0, 0.0, 3.0])}


def gated(fn, made):
    def run(trainable, gates):
        ctx = {"gate": jl.PerSite(gates)}
        return jl.lift(fn)(LAYERS, made.replace(trainable=trainable), X, ctx=ctx)

    return run


@pytest.mark.parametrize("fn", [scanned, rematted, unrolled])
def test_each_layer_gets_its_own_side_input(fn):
    made = noisy(Gated(2))
    want = gradients(lambda t, g: by_hand(t, g, X), made.trainable, GATES)
    same(gradients(gated(fn, made), made.trainable, GATES), want)


def test_mutation_a_side_input_of_another_layer_is_seen(monkeypatch):
    unstack = Lazy.unstack

    def swapped(self, axis):
        (base, own), rebuild = unstack(self, axis)
        turned = {k: jnp.flip(t, 0) if k.startswith(SIDE) else t for k, t in own.items()}
        return (base, turned), rebuild

    made = noisy(Gated(2))
    monkeypatch.setattr(Lazy, "unstack", swapped)
    with pytest.raises(AssertionError):
        same(gated(scanned, made)(made.trainable, GATES), by_hand(made.trainable, GATES, X))


def test_side_inputs_map_and_shard():
    made = noisy(Gated(2))
    run = gated(scanned, made)
    many = jax.tree.map(lambda t: jnp.stack([t, 2 * t]), GATES)
    each = [run(made.trainable, GATES), run(made.trainable, jax.tree.map(lambda t: 2 * t, GATES))]
    same(jax.vmap(run, (None, 0))(made.trainable, many), jnp.stack(each))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.device_put(jnp.tile(X, (4, 1)), spec)
    ctx = {"gate": jl.PerSite(GATES)}
    got = jax.jit(lambda a, x: jl.lift(scanned)(LAYERS, a, x, ctx=ctx))(made, x)
    same(got, jnp.tile(each[0], (4, 1)))


@pytest.mark.parametrize("fn", [scanned, rematted, unrolled])
def test_a_site_knows_its_index(fn):
    made = noisy(Numbered(2))
    numbers = dict.fromkeys("qv", jnp.arange(1.0, 4.0))
    run = lambda t: jl.lift(fn)(LAYERS, made.replace(trainable=t), X)  # noqa: E731
    want = gradients(lambda t: by_hand(t, numbers, X), made.trainable)
    same(gradients(run, made.trainable), want)


def test_layers_that_are_leaves_are_numbered_by_their_paths():
    made, gate = noisy(Gated(2)), jnp.asarray([0.5, -1.0, 2.0])
    apart = {f"h{i}": {name: w[i] for name, w in LAYERS.items()} for i in range(3)}

    def loop(p, x):
        for i in range(3):
            x = layer(x, p[f"h{i}"])
        return x

    fresh = jl.init(jax.random.key(0), loop, apart, X, methods={"q|v": Gated(2)})
    own = {
        f"h{i}/{name}": jax.tree.map(lambda t, i=i: t[i], made.trainable[name])
        for i in range(3) for name in LAYERS
    }  # fmt: skip
    ctx = {"gate": jl.PerSite({r"h(\d)/": gate})}
    got = jl.lift(loop)(apart, fresh.replace(trainable=own), X, ctx=ctx)
    same(got, jl.lift(scanned)(LAYERS, made, X, ctx={"gate": jl.per_layer(gate)}))


def test_side_inputs_that_fit_no_site_are_refused():
    made = noisy(Gated(2))
    run = lambda gate: jl.lift(scanned)(LAYERS, made, X, ctx={"gate": gate})  # noqa: E731
    with pytest.raises(ValueError, match=r"ctx\['gate'\]: 'k' is no adapted site; nearest"):
        run(jl.PerSite({"k": jnp.ones(3), "": jnp.ones(3)}))
    with pytest.raises(
        ValueError, match=r"ctx\['gate'\] of q: got shape \(2,\), expected .*\(3,\)"
    ):
        run(jl.per_layer(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"ctx\['index'\]: q has the index of its slice"):
        jl.lift(scanned)(LAYERS, noisy(Numbered(2)), X, ctx={"index": 1})

    def halves(p, x):
        return x @ p["q"][0][:, :2]

    with pytest.raises(jl.DenseWeightError, match="q"):  # a part of a matrix has no such axes
        jl.lift(halves, unread="allow")(LAYERS, made, X, ctx={"gate": jl.per_layer(jnp.ones(3))})


@dataclasses.dataclass(frozen=True)
class Deciding(jl.LoRA):
    """Decides at q, from its own `r`; q and v multiply their deltas with the decision."""

    def init(self, key, site, context):
        trainable, frozen = super().init(key, site, context)
        return trainable | ({"r": jnp.zeros((4, 1))} if site.path == "q" else {}), frozen

    def apply(self, x, w, p, ctx):
        decision = jnp.tanh(x @ p["r"]) if "r" in p else ctx["decision"]
        y = x @ w + decision * (x @ p["a"] @ p["b"])
        return (y, {}, {"decision": decision}) if "r" in p else y


def decided_by_hand(t, x):
    for i in range(3):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], t)
        decision = jnp.tanh(x @ p["q"]["r"])
        h = jnp.tanh(x @ LAYERS["q"][i] + decision * (x @ p["q"]["a"] @ p["q"]["b"]))
        x = x + h @ LAYERS["v"][i] + decision * (h @ p["v"]["a"] @ p["v"]["b"])
    return x


def partly_rematted(p, x):
    """The site that decides is in a checkpoint, the one that follows is not."""
    first = jax.checkpoint(lambda h, q: jnp.tanh(h @ q))
    return lax.scan(lambda h, w: (h + first(h, w["q"]) @ w["v"], None), x, p)[0]


@pytest.mark.parametrize("fn", [scanned, rematted, partly_rematted, unrolled])
def test_later_sites_read_what_one_decided_and_its_gradient_has_all_readers(fn):
    made = noisy(Deciding(2))
    run = lambda t: jl.lift(fn)(LAYERS, made.replace(trainable=t), X)  # noqa: E731
    want = gradients(lambda t: decided_by_hand(t, X), made.trainable)
    same(gradients(run, made.trainable), want)


def test_mutation_a_reader_without_a_gradient_is_seen(monkeypatch):
    publish = Scope.publish
    cut = lambda self, values: publish(self, lax.stop_gradient(values))  # noqa: E731
    monkeypatch.setattr(Scope, "publish", cut)
    made = noisy(Deciding(2))
    run = lambda t: jl.lift(scanned)(LAYERS, made.replace(trainable=t), X)  # noqa: E731
    with pytest.raises(AssertionError):
        want = gradients(lambda t: decided_by_hand(t, X), made.trainable)
        same(gradients(run, made.trainable), want)


def test_a_decision_does_not_leave_its_loop_and_has_one_name():
    made = noisy(Deciding(2))

    def after(p, x):
        h = lax.scan(lambda h, q: (h @ q, None), x, p["q"])[0]
        return h @ p["v"][0]

    with pytest.raises(KeyError, match="decision"):
        jl.lift(after)(LAYERS, made, X)
    with pytest.raises(ValueError, match="publishes 'decision', which ctx has"):
        jl.lift(scanned)(LAYERS, made, X, ctx={"decision": 1})
