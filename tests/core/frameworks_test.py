"""Lifting equals merging on models of Flax Linen, Flax NNX and Equinox, none of which know it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora as jl

LORA = jl.LoRA(2, 4.0)
X = np.random.default_rng(0).normal(size=(2, 5, 8))
IDS = np.array([[0, 3, 1], [2, 2, 6]], np.int32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attn")(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(8, name="down")(h), None


class Scanned(nn.Module):
    policy: object = None

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False, policy=self.policy)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = Block(name=f"block_{i}")(x, None)
        return nn.Dense(3, name="head")(x)


class General(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.DenseGeneral(7, axis=(-2, -1), name="join")(x)
        x = nn.Einsum((7, 2, 4), "btd,dnh->btnh", name="einsum")(x)
        x = nn.DenseGeneral((5,), axis=(-1,), batch_dims=(0,), name="batched")(x)
        return x


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 8, name="table")
        return table.attend(jnp.tanh(nn.Dense(8, name="mid")(table(ids))))


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), strides=(2, 1), name="plain")(x)
        x = nn.Conv(8, (2, 3), feature_group_count=2, kernel_dilation=(1, 2), name="grouped")(x)
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="up")(x)
        return x


class OtherConvs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2, name="line")(x)
        x = nn.Conv(8, (3,), feature_group_count=4, name="depthwise")(x)
        x = x.reshape(2, 3, 2, 2, 4)
        return nn.Conv(3, (2, 1, 2), strides=(1, 2, 1), feature_group_count=1, name="space")(x)


def linen(module, x):
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), x)


def filled(shapes):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape) / 3, t.dtype), shapes)


LINEN = {
    "scan and remat": (Scanned(jax.checkpoint_policies.dots_saveable), X, r"kernel"),
    "scan and remat, nothing saved": (
        Scanned(jax.checkpoint_policies.nothing_saveable),
        X,
        r"up/kernel",
    ),
    "scan and remat, names saved": (
        Scanned(jax.checkpoint_policies.save_only_these_names("h")),
        X,
        r"up/kernel",
    ),
    "general": (General(), X, r"kernel"),
    "tied": (Tied(), IDS, r"embedding|kernel"),
    "convolutions": (Convs(), np.ones((2, 5, 6, 2)), r"kernel"),
    "other convolutions": (OtherConvs(), np.ones((2, 6, 2)), r"kernel"),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(law32, name):
    module, x, pattern = LINEN[name]
    fn, shapes = linen(module, x)
    law32(fn, filled(shapes), {pattern: LORA}, x)


def test_linen_scanned_equals_unrolled():
    """L6, with the adapter's arrays carried over slice by slice."""
    x = jnp.asarray(X, jnp.float32)
    fn, shapes = linen(Scanned(), x)
    params = filled(shapes)
    a = jl.init(jax.random.key(0), fn, params, x, methods={"all-linear": LORA})
    a = a.replace(trainable=filled(a.trainable))
    flat = {"params": {"head": params["params"]["head"]}}
    for i in range(2):
        flat["params"][f"block_{i}"] = jax.tree.map(lambda t, i=i: t[i], params["params"]["blocks"])
    other = jl.init(jax.random.key(0), Unrolled().apply, flat, x, methods={"all-linear": LORA})

    def slices(part):
        out = {}
        for path in other.trainable:
            i = path.split("block_")[1][0] if "block_" in path else None
            source = path if i is None else path.replace(f"block_{i}", "blocks")
            out[path] = {k: v if i is None else v[int(i)] for k, v in part[source].items()}
        return out

    other = other.replace(trainable=slices(a.trainable), frozen=slices(a.frozen))
    np.testing.assert_allclose(
        jl.lift(fn)(params, a, x), jl.lift(Unrolled().apply)(flat, other, x), rtol=2e-5, atol=2e-6
    )


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(11, 8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.one = nnx.Linear(8, 6, rngs=rngs)
        self.two = nnx.LinearGeneral(6, (2, 3), rngs=rngs)
        self.conv = nnx.Conv(3, 4, (2,), rngs=rngs)

    def __call__(self, ids):
        x = self.attn(self.table(ids))
        return self.conv(self.two(nnx.relu(self.one(x)))[:, :, 0])


def nnx_function(module):
    """(function of a plain dict of parameters, that dict)."""
    graph, state = nnx.split(module)

    def fn(params, x):
        new = jax.tree.map(lambda t: t, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new)(x)

    return fn, nnx.to_pure_dict(state)


def test_nnx(law32):
    fn, params = nnx_function(Nnx(nnx.Rngs(0)))
    law32(fn, params, {"kernel|embedding": LORA}, np.arange(14, dtype=np.int32).reshape(2, 7) % 11)


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return nnx.tanh(layer(x))

        return run(self.layers, x)


def test_nnx_scan(law32):
    fn, params = nnx_function(NnxStack(nnx.Rngs(0)))
    adapter = law32(fn, params, {"kernel": LORA}, X)
    assert adapter.sites[0][0].kinds == "sio"


def test_equinox(law32):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 3, 6, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)

    def fn(arrays, x):
        return jax.vmap(jax.vmap(eqx.combine(arrays, static)))(x)

    adapter = law32(fn, arrays, {"all-linear": LORA}, X)
    assert [s.kinds for s, _ in adapter.sites] == ["oi"] * 3


def test_equinox_stack(law32):
    eqx = pytest.importorskip("equinox")
    make = jax.vmap(lambda k: eqx.nn.Linear(8, 8, key=k))
    arrays, static = eqx.partition(make(jax.random.split(jax.random.key(0), 2)), eqx.is_array)

    def fn(arrays, x):
        def step(h, layer):
            return jnp.tanh(jax.vmap(jax.vmap(eqx.combine(layer, static)))(h)), None

        return jax.lax.scan(step, x, arrays)[0]

    adapter = law32(fn, arrays, {"weight": LORA}, X)
    assert adapter.sites[0][0].kinds == "soi"


def test_equinox_embedding_in_a_module_that_is_the_parameters(law32):
    """`eqx.nn.Embedding` looks up one row, under vmap; the module itself is the PyTree."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "table": eqx.nn.Embedding(7, 8, key=keys[0]),
        "mlp": eqx.nn.MLP(8, 8, 6, 1, key=keys[1]),  # holds functions besides arrays
    }

    def fn(m, ids):
        h = jax.vmap(m["mlp"])(jax.vmap(m["table"])(ids))
        return h @ m["table"].weight.T

    ids = np.array([0, 3, 6, 3], np.int32)
    a = jl.init(jax.random.key(0), fn, model, ids, methods={"weight": LORA})
    assert {s.path: s.kinds for s, _ in a.sites}["table/weight"] == "io"
    a = a.replace(trainable=filled(a.trainable))
    np.testing.assert_allclose(
        jl.lift(fn)(model, a, ids), fn(jl.merge(model, a), ids), rtol=2e-4, atol=2e-5
    )
    arrays, static = eqx.partition(model, eqx.is_array)
    law32(lambda arrays, ids: fn(eqx.combine(arrays, static), ids), arrays, {"weight": LORA}, ids)


class NnxRemat(NnxStack):
    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return nnx.tanh(layer(x))

        return run(self.layers, x)


def test_nnx_scan_of_remat(law32):
    """The scan's step hands the layer's weights back through the checkpoint."""
    fn, params = nnx_function(NnxRemat(nnx.Rngs(0)))
    adapter = law32(fn, params, {"kernel": LORA}, X)
    assert adapter.sites[0][0].kinds == "sio"
