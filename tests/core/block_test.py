"""A block's experts against a loop over merged experts, in value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.core import block as block_module
from jlora.methods.routed.mixlora import MixLoRA
from jlora.routing.router import top_k

LAYERS, EXPERTS, WIDTH, HIDDEN = 2, 3, 4, 6


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS = {
    "gate": leaf(LAYERS, WIDTH, HIDDEN),
    "up": leaf(LAYERS, WIDTH, HIDDEN, seed=1),
    "down": leaf(LAYERS, HIDDEN, WIDTH, seed=2),
}
X = leaf(2, 3, WIDTH, seed=3)


def ffn(h, w):
    return (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def layer(h, w):
    return h + jl.block("block", ffn)(h, w)


def scanned(p, x):
    return lax.scan(lambda h, w: (layer(h, w), None), x, p)[0]


def rematted(p, x):
    return lax.scan(jax.checkpoint(lambda h, w: (layer(h, w), None)), x, p)[0]


def unrolled(p, x):
    for i in range(LAYERS):
        x = layer(x, {name: w[i] for name, w in p.items()})
    return x


def sliced_inside(p, x):
    """The block takes its layer out of the stacks itself, from a closure."""
    for i in range(LAYERS):
        x = x + jl.block("block", lambda h, i=i: ffn(h, {k: w[i] for k, w in p.items()}))(x)
    return x


def adapter(method=None, sites="gate|up|down"):
    method = method or MixLoRA(jl.LoRA(2, alpha=3.0), experts=EXPERTS)
    fresh = jl.init(jax.random.key(0), scanned, PARAMS, X, methods={sites: method})
    rng = np.random.default_rng(4)
    move = lambda t: t + jnp.asarray(rng.normal(size=t.shape) / 4, t.dtype)  # noqa: E731
    return fresh.replace(trainable=jax.tree.map(move, fresh.trainable))


MADE = adapter()


def by_hand(trainable, x):
    """Every expert merged, run, and weighed by the two largest logits of the router."""
    for i in range(LAYERS):
        logits = x @ trainable["gate"]["router"][i]
        second = jnp.sort(logits, -1)[..., 1:2]
        gates = jax.nn.softmax(jnp.where(logits >= second, logits, -jnp.inf), -1)
        total = 0.0
        for e in range(EXPERTS):
            w = {}
            for name, base in PARAMS.items():
                p = trainable[name]
                w[name] = base[i] + 1.5 * p["expert_a"][i, e] @ p["expert_b"][i, e]
            total += gates[..., e : e + 1] * ffn(x, w)
        x = x + total
    return x


def gradients(run, trainable):
    return jax.jit(jax.value_and_grad(lambda t: jnp.sum(run(t) ** 2)))(trainable)


def lifted(fn, made=MADE, **kwargs):
    return lambda t: jl.lift(fn, **kwargs)(PARAMS, made.replace(trainable=t), X)


def same(got, want):
    def close(g, w):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * (0.1 + np.abs(w).max()))

    jax.tree.map(close, got, want)


@pytest.fixture(scope="module")
def expected():
    return gradients(lambda t: by_hand(t, X), MADE.trainable)


@pytest.mark.parametrize("fn", [scanned, rematted, unrolled, sliced_inside])
def test_a_block_is_the_mix_of_its_merged_experts(fn, expected):
    same(gradients(lifted(fn), MADE.trainable), expected)


def test_a_bank_of_blocks_is_mapped(expected):
    other = jax.tree.map(lambda t: 0.5 * t, MADE.trainable)
    both = jax.tree.map(lambda *t: jnp.stack(t), MADE.trainable, other)
    got = jax.vmap(lifted(scanned))(both)
    same(got, jnp.stack([by_hand(MADE.trainable, X), by_hand(other, X)]))


def test_the_batch_may_be_sharded():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.device_put(jnp.tile(X, (4, 1, 1)), spec)
    got = jax.jit(lambda a, x: jl.lift(scanned)(PARAMS, a, x))(MADE, x)
    same(got, by_hand(MADE.trainable, jnp.tile(X, (4, 1, 1))))


def test_what_does_not_depend_on_the_expert_is_done_once():
    """Of the base's matmuls only that of `down` has an axis of experts."""
    lift_one = jl.lift(lambda p, x: layer(x, jax.tree.map(lambda w: w[0], p)))
    jaxpr = jax.make_jaxpr(lift_one)(PARAMS, MADE, X)
    shapes = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert shapes.count((2, 3, HIDDEN)) == 2, shapes  # x W of gate and of up, no axis of experts


def test_other_methods_and_unmarked_calls_are_not_touched():
    made = adapter(jl.LoRA(2))
    w = jl.merge(PARAMS, made)
    same(jl.lift(scanned)(PARAMS, made, X), scanned(w, X))
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, scanned(PARAMS, X), jl.lift(scanned)(PARAMS, {}, X))
    )


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match=r"outside of jl.block\('block'"):
        jl.lift(lambda p, x: x @ p["gate"][0], unread="allow")(PARAMS, MADE, X)
    with pytest.raises(NotImplementedError, match="no merge"):
        jl.merge(PARAMS, MADE)
    with pytest.raises(ValueError, match="depends on the expert"):
        lifted(scanned, (made := adapter(MixLoRA(jl.LoRA(2), router="down"))))(made.trainable)
    methods = {"gate": MixLoRA(jl.LoRA(2), experts=3), "up|down": MixLoRA(jl.LoRA(2), experts=4)}
    made = jl.init(jax.random.key(0), scanned, PARAMS, X, methods=methods)
    with pytest.raises(ValueError, match=r"block 'block': .*expected equal numbers"):
        jl.lift(scanned)(PARAMS, made, X)


def test_mutation_mixing_before_the_nonlinearity_is_seen(expected):
    """Experts mixed at each matmul are another function."""

    def early(p, x):
        for i in range(LAYERS):
            w = {name: t[i] for name, t in p.items()}
            gate = jl.block("block", lambda h, w=w: h @ w["gate"])(x)
            up = jl.block("block", lambda h, w=w: h @ w["up"])(x)
            x = x + jl.block("block", lambda h, w=w: h @ w["down"])(jax.nn.silu(gate) * up)
        return x

    with pytest.raises(AssertionError):
        same(lifted(early)(MADE.trainable), expected[0])


def test_mutation_one_expert_for_all_is_seen(monkeypatch, expected):
    experts = block_module._experts

    def first(w):
        own, common, method = experts(w)
        axis = len(w.of("s"))
        return {k: jnp.roll(t, 1, axis) for k, t in own.items()}, common, method

    monkeypatch.setattr(block_module, "_experts", first)
    with pytest.raises(AssertionError):
        same(lifted(scanned)(MADE.trainable), expected[0])


@dataclasses.dataclass(frozen=True)
class Outside(jl.LoRA):
    """A router at a site before the block."""

    def init(self, key, site, context):
        trainable, frozen = super().init(key, site, context)
        return trainable | {"r": jax.random.normal(key, (site.d_in, EXPERTS))}, frozen

    def apply(self, x, w, p, ctx):
        return super().apply(x, w, p, ctx), {}, {"block": top_k(x @ p["r"], 2)}


def test_a_router_may_be_at_a_named_site_before_the_block():
    params = {**PARAMS, "q": leaf(LAYERS, WIDTH, WIDTH, seed=7)}

    def model(p, x):
        return lax.scan(lambda h, w: (layer(h @ w["q"], w), None), x, p)[0]

    methods = {"q": Outside(2), "": MixLoRA(jl.LoRA(2, alpha=3.0), experts=3, router="none")}
    made = jl.init(jax.random.key(0), model, params, X, methods=methods)
    made = made.replace(trainable={**MADE.trainable, "q": made.trainable["q"]})

    def want(t):
        x = X
        for i in range(LAYERS):
            logits = x @ t["q"]["r"][i]
            second = jnp.sort(logits, -1)[..., 1:2]
            gates = jax.nn.softmax(jnp.where(logits >= second, logits, -jnp.inf), -1)
            x, total = x @ params["q"][i], 0.0
            for e in range(EXPERTS):
                w = {
                    k: PARAMS[k][i] + 1.5 * t[k]["expert_a"][i, e] @ t[k]["expert_b"][i, e]
                    for k in PARAMS
                }
                total += gates[..., e : e + 1] * ffn(x, w)
            x = x + total
        return x

    t = jax.tree.map(lambda v: v, made.trainable)
    t["gate"] = {k: v for k, v in t["gate"].items() if k != "router"}
    t["q"] = {**t["q"], "b": jnp.zeros_like(t["q"]["b"])}
    same(jl.lift(model)(params, made.replace(trainable=t), X), want(t))
