"""L9 on a 2x4 host mesh, fsdp by tensor: sharded equals unsharded, and collectives are counted."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora as jl

D, F, L = 8, 16, 2


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 4, jnp.float32)


PARAMS = {
    "query": leaf(L, D, 4, 2, seed=1),
    "out": leaf(L, 4, 2, D, seed=2),
    "up": leaf(L, D, F, seed=3),
    "down": leaf(L, F, D, seed=4),
}
SPECS = {
    "query": P(None, "fsdp", "tensor", None),
    "out": P(None, "tensor", None, "fsdp"),
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
}
X = leaf(4, 6, D)


def model(explicit):
    """A scanned block; on an explicit mesh rows are told where their sums go, as JAX asks."""
    place = {"out_sharding": P("fsdp", None, None)} if explicit else {}
    split = {"out_sharding": P("fsdp", None, "tensor")} if explicit else {}
    heads = {"out_sharding": P("fsdp", None, "tensor", None)} if explicit else {}

    def block(h, w):
        q = jnp.einsum("btd,dnh->btnh", h, w["query"], **heads)
        h = h + jnp.einsum("btnh,nhd->btd", jnp.tanh(q), w["out"], **place)
        u = jnp.tanh(jnp.einsum("btd,df->btf", h, w["up"], **split))
        return h + jnp.einsum("btf,fd->btd", u, w["down"], **place), None

    return lambda p, x: lax.scan(block, x, p)[0]


def adapter(method=None):
    a = jl.init(jax.random.key(0), model(False), PARAMS, X, methods={"": method or jl.LoRA(2)})
    return a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))


def step(fn):
    def loss(trainable, a, p, x):
        return jnp.mean(jl.lift(fn)(p, a.replace(trainable=trainable), x) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def sharded(kind):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    put = lambda t, s: jax.device_put(t, NamedSharding(mesh, s))  # noqa: E731
    params = {k: put(w, SPECS[k]) for k, w in PARAMS.items()}
    return mesh, params, put(X, P("fsdp"))


def specs_of(a, mesh):
    return jax.tree.map(lambda s: s.spec, jl.specs(a, SPECS, mesh).trainable)


def test_specs_inherit_tensor_axes_and_replicate_fsdp():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    got = specs_of(adapter(), mesh)
    none = P(None, None, None)
    assert got["query"] == {"a": none, "b": P(None, None, "tensor")}
    assert got["out"] == {"a": P(None, "tensor", None), "b": none}
    assert got["up"] == {"a": none, "b": P(None, None, "tensor")}
    assert got["down"] == {"a": P(None, "tensor", None), "b": none}
    everywhere = jl.specs(adapter(), SPECS, mesh, fsdp=())
    assert everywhere.trainable["up"]["a"].spec == P(None, "fsdp", None)
    bank = jl.stack([adapter()] * 2)
    led = jl.specs(bank, SPECS, mesh, lead=("fsdp",))
    assert led.trainable["up"]["b"].spec == P("fsdp", None, None, "tensor")
    assert led.frozen["up"]["scale"].spec == P("fsdp", None)


def test_specs_of_arrays_without_a_rank():
    """Told apart by size; d_in equal to d_out cannot be, so those are copies."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    class Vector(jl.Method):
        def init(self, key, site):
            return {"v": jnp.zeros(site.d_out)}, {}

    got = specs_of(adapter_of(Vector()), mesh)
    assert got["up"]["v"] == P(None, "tensor") and got["down"]["v"] == P(None, None)
    assert got["query"]["v"] == P(None, None)


def adapter_of(method):
    return jl.init(jax.random.key(0), model(False), PARAMS, X, methods={"": method})


def test_bad_specs():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="down: no spec among those of the base"):
        jl.specs(adapter(), {}, mesh)
    with pytest.raises(ValueError, match="up: got mesh axis 'model', not in"):
        jl.specs(adapter(), {**SPECS, "up": P(None, "model")}, mesh)
    with pytest.raises(ValueError, match=r"up: got the spec .* for the shape"):
        jl.specs(adapter(), {**SPECS, "up": P(None, None, None, "tensor")}, mesh)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_unsharded(kind):
    mesh, params, x = sharded(kind)
    a = adapter()
    fn = model(kind == AxisType.Explicit)
    v0, g0 = step(model(False))(a.trainable, a, PARAMS, X)
    placed = jax.device_put(a, jl.specs(a, SPECS, mesh))
    with jax.set_mesh(mesh):
        v1, g1 = step(fn)(placed.trainable, placed, params, x)
        merged = jl.merge(params, placed) if kind == AxisType.Auto else None
    np.testing.assert_allclose(v1, v0, rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(g1), jax.tree.leaves(g0), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert g1["up"]["b"].sharding.is_equivalent_to(placed.trainable["up"]["b"].sharding, 3)
    if merged is not None:
        plain = jl.merge(PARAMS, a)
        np.testing.assert_allclose(merged["out"], plain["out"], rtol=1e-5, atol=1e-6)


def collectives(compiled):
    """{name: (count, bytes)} in a compiled program."""
    found = collections.Counter()
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for match in re.finditer(rf"= (\(?[^=]*?\)?) ({names})(?:-start)?\(", compiled.as_text()):
        found[match.group(2)] += 1
    return found


def test_collectives():
    """No more than the base needs, plus one sum of the adapter's gradients a use."""
    mesh, params, x = sharded(AxisType.Auto)
    base = jax.jit(jax.value_and_grad(lambda x, p: jnp.mean(model(False)(p, x) ** 2)))
    plain = collectives(base.lower(x, params).compile())
    counts = {}
    for name, fsdp in (("ours", ("fsdp",)), ("all inherited", ())):
        a = adapter()
        placed = jax.device_put(a, jl.specs(a, SPECS, mesh, fsdp=fsdp))
        lowered = step(model(False)).lower(placed.trainable, placed, params, x)
        counts[name] = collectives(lowered.compile())
    ours = counts["ours"]
    sites = 4
    assert ours["all-gather"] <= plain["all-gather"]
    assert ours["all-reduce"] <= plain["all-reduce"] + sites
    assert ours["collective-permute"] <= plain["collective-permute"]
    assert ours["all-to-all"] <= plain["all-to-all"]
    assert sum(ours.values()) < sum(counts["all inherited"].values())
