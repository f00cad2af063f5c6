"""The decoder in bfloat16, and split over eight devices: the same function, value and gradient."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.models import decoder

CONFIG = decoder.DecoderConfig(
    "gemma3_text", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32,
    max_positions=64, local_rope=decoder.Rope(50.0), local=(True, False), window=4, qk_norm=True,
    unit_norms=True, post_norms=True, init_std=0.3, tied=True,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 40, (4, 8)).astype(np.int32)
SPLIT = {  # path -> axes
    "embed_tokens/embedding": ("tensor", "fsdp"),
    "query/kernel": (None, "fsdp", "tensor"),
    "key/kernel": (None, "fsdp", "tensor"),
    "value/kernel": (None, "fsdp", "tensor"),
    "out/kernel": (None, "tensor", "fsdp"),
    "gate/kernel": (None, "fsdp", "tensor"),
    "up/kernel": (None, "fsdp", "tensor"),
    "down/kernel": (None, "tensor", "fsdp"),
}


def value_and_grad(config):
    def loss(params, ids):
        out = decoder.forward(params, ids, config=config, remat="dots")
        return decoder.loss(out.logits, ids, jnp.ones(ids.shape))

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def whole():
    """(function, parameters, value, gradient) on one device in float32."""
    params = decoder.init(jax.random.key(0), CONFIG)
    run = value_and_grad(CONFIG)
    return run, params, *run(params, jnp.asarray(IDS))


def test_eight_devices_give_the_value_and_gradient_of_one(whole):
    run, params, value, grads = whole
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for end, axes in SPLIT.items() if name.endswith(end)), ())
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    split = jax.tree_util.tree_map_with_path(place, params)
    down = split["layers"]["ffn"]["down"]["kernel"]
    assert len(down.sharding.device_set) == 8
    assert down.addressable_shards[0].data.shape == (2, 8, 8)
    ids = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec("fsdp")))
    got, got_grads = run(split, ids)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    chex.assert_trees_all_close(got_grads, grads, rtol=1e-4, atol=1e-5)


def test_bfloat16_gives_the_value_and_gradient_of_float32_to_its_precision(whole):
    _, params, value, grads = whole
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    got, got_grads = value_and_grad(config)(half, jnp.asarray(IDS))
    assert got.dtype == jnp.float32, "the loss is float32"
    np.testing.assert_allclose(got, value, rtol=0.02)
    for leaf in jax.tree.leaves(got_grads):
        assert leaf.dtype == jnp.bfloat16
    flat = lambda tree: np.concatenate(  # noqa: E731
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )
    x, y = flat(got_grads), flat(grads)
    assert x @ y > 0.99 * np.linalg.norm(x) * np.linalg.norm(y)


def test_the_cache_and_the_logits_have_the_dtypes_that_are_promised():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = jax.eval_shape(functools.partial(decoder.init, config=config), jax.random.key(0))
    cache = jax.eval_shape(functools.partial(decoder.empty_cache, config, 4, 8))
    forward = functools.partial(decoder.forward, config=config)
    positions = jnp.tile(jnp.arange(8, dtype=jnp.int32), (4, 1))
    out = jax.eval_shape(forward, params, IDS, positions, None, cache)
    assert out.logits.dtype == jnp.float32 and out.cache.key.dtype == jnp.bfloat16
