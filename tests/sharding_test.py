"""L9 on a 2x4 host mesh, fsdp by tensor: sharded equals unsharded, and collectives are counted."""

import collections
import math
import re

import chex
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
        def init(self, key, site, context):
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
        merged = jl.merge(params, placed)
    np.testing.assert_allclose(v1, v0, rtol=1e-5)
    chex.assert_trees_all_close(g1, g0, rtol=1e-4, atol=1e-6)
    assert g1["up"]["b"].sharding.is_equivalent_to(placed.trainable["up"]["b"].sharding, 3)
    plain = jl.merge(PARAMS, a)
    for name, w in plain.items():
        np.testing.assert_allclose(merged[name], w, rtol=1e-5, atol=1e-6)
        assert merged[name].sharding.is_equivalent_to(params[name].sharding, w.ndim)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_made_trained_saved_and_restored_where_it_lies(kind, tmp_path):
    """Init, three steps and a checkpoint half way, all sharded, as on one device."""
    mesh, params, x = sharded(kind)
    fn = model(kind == AxisType.Explicit)

    def fresh(fn, params, x):
        return jl.init(jax.random.key(3), fn, params, x, methods={"": jl.LoRA(2)})

    def trained(fn, a, params, x, steps):
        for _ in range(steps):
            _, g = fn(a.trainable, a, params, x)
            a = a.replace(trainable=jax.tree.map(lambda t, d: t - 0.5 * d, a.trainable, g))
        return a

    alone = trained(step(model(False)), fresh(model(False), PARAMS, X), PARAMS, X, 3)
    with jax.set_mesh(mesh):
        places = jl.specs(jax.eval_shape(lambda p: fresh(fn, p, x), params), SPECS, mesh)
        make = jax.jit(lambda p, x: fresh(fn, p, x), out_shardings=places)
        run = step(fn)
        half = trained(run, make(params, x), params, x, 2)
    jl.io.save_adapter(tmp_path / "half", half)  # outside: Orbax of JAX 0.8 fails under set_mesh
    like = jax.tree.map(
        lambda t, s: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=s), half, places
    )
    back = jl.io.restore_adapter(tmp_path / "half", like=like)
    with jax.set_mesh(mesh):
        whole = trained(run, back, params, x, 1)
    for t, b, place in zip(*map(jax.tree.leaves, (half, back, places)), strict=True):
        np.testing.assert_array_equal(t, b)
        assert b.sharding.is_equivalent_to(place, b.ndim)
    assert not back.trainable["up"]["b"].sharding.is_fully_replicated
    chex.assert_trees_all_close(whole, alone, rtol=1e-4, atol=1e-6)
    anywhere = jl.io.restore_adapter(tmp_path / "half")  # a checkpoint is not tied to its mesh
    for t, b in zip(jax.tree.leaves(half), jax.tree.leaves(anywhere), strict=True):
        np.testing.assert_array_equal(t, b)
        assert len(b.sharding.device_set) == 1


NAMES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(compiled):
    """({name: how many}, bytes that they yield, a loop's body counted once) of a program."""
    found, size = collections.Counter(), 0
    for line in compiled.as_text().splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(NAMES)})(?:-start)?\(", line)
        if match:
            found[match.group(2)] += 1
            shapes = re.findall(r"f32\[([\d,]*)\]", match.group(1))
            size += 4 * sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
    return found, size


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_collectives(kind):
    """No more than the base needs, plus one sum of the adapter's gradients a use."""
    mesh, params, x = sharded(kind)
    fn = model(kind == AxisType.Explicit)
    base = jax.jit(jax.value_and_grad(lambda x, p: jnp.mean(fn(p, x) ** 2)))
    a = adapter()
    with jax.set_mesh(mesh):
        plain, plain_size = collectives(base.lower(x, params).compile())

        def of(fsdp):
            placed = jax.device_put(a, jl.specs(a, SPECS, mesh, fsdp=fsdp))
            return collectives(step(fn).lower(placed.trainable, placed, params, x).compile())

        ours, size = of(("fsdp",))
        inherited, inherited_size = of(())
    sites, rank, rows = len(a.sites), 2, X.shape[0] // 2 * X.shape[1]
    assert plain["all-reduce"] >= sites and plain_size > 0, "nothing was counted"
    assert ours["all-reduce"] <= plain["all-reduce"] + sites
    for name in set(NAMES) - {"all-reduce"}:
        assert ours[name] <= plain[name], name
    # the gradients of a layer, and x @ a or dy @ b.T where the summed axis is split, once a site
    own = sum(t.nbytes // L for t in jax.tree.leaves(a.trainable)) + 4 * sites * rows * rank
    assert size <= plain_size + own < inherited_size  # the latter: what replicating is for
    assert sum(ours.values()) < sum(inherited.values())
