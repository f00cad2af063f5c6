"""One step: packed documents do not leak, parts add up, and neither mesh nor dtype changes it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.finetuning import adapter as adapters
from experiments.finetuning import base as bases
from experiments.finetuning import loss, mesh, packing, step
from experiments.finetuning.chat import Document
from experiments.finetuning.settings import Settings
from jlora.models import decoder

CONFIG = decoder.DecoderConfig(
    "llama", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32,
    max_positions=64, tied=True, init_std=0.2,
)  # fmt: skip
SETTINGS = Settings(rank=2, alpha=4.0)
PARAMS = decoder.init(jax.random.key(0), CONFIG)
RNG = np.random.default_rng(0)
DOCUMENTS = [
    Document(RNG.integers(4, 40, n).astype(np.int32), np.arange(n) >= n // k, "f:1")
    for n, k in ((6, 3), (5, 2), (9, 4), (4, 2))
]
SIZE = 12


def noisy(adapter):
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)  # noqa: E731
    return adapter.replace(trainable=jax.tree.map(noise, adapter.trainable))


@pytest.fixture(scope="module")
def adapter():
    return noisy(adapters.fresh(jax.random.key(1), PARAMS, CONFIG, SETTINGS))


def tuned(**change):
    config = dataclasses.replace(CONFIG, **change)
    return jl.lift(adapters.forward(config, SETTINGS))


def stacked(rows, parts):
    return packing.Rows(*(jnp.asarray(x).reshape(parts, -1, SIZE) for x in rows))


@pytest.fixture(scope="module")
def taken(adapter):
    """(rows, parts, places) -> (adapter, loss) after one step of gradient descent with rate 1."""
    run = jax.jit(step.make(tuned(), optax.sgd(1.0)))

    def take(rows, parts, params=PARAMS, adapter=adapter):
        state = step.initial(adapter.trainable, optax.sgd(1.0), 3)
        state, report = run(params, adapter, state, stacked(rows, parts), jax.random.key(0))
        assert bool(report.finite) and float(state.losses[0]) == float(report.loss)
        return state.trainable, float(report.loss)

    return take


@pytest.fixture(scope="module")
def alone():
    return packing.rows(DOCUMENTS, SIZE, pack=False)


def test_packed_documents_give_the_loss_and_gradient_of_separate_ones(taken, alone):
    packed = packing.rows(DOCUMENTS, SIZE)
    assert len(packed.ids) == 3 and len(alone.ids) == 4
    packed = packing.Rows(
        *(np.concatenate(x) for x in zip(packed, packing.empty(1, SIZE), strict=True))
    )
    want, want_loss = taken(alone, 1)
    got, got_loss = taken(packed, 1)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    leaky = packed._replace(segments=np.zeros_like(packed.segments))  # mutations
    assert abs(taken(leaky, 1)[1] - want_loss) > 1e-3
    shifted = packed._replace(positions=np.tile(np.arange(SIZE, dtype=np.int32), (4, 1)))
    assert abs(taken(shifted, 1)[1] - want_loss) < 1e-4  # RoPE sees differences only
    learned = packed._replace(weights=(packed.segments >= 0).astype(np.float32))
    assert abs(taken(learned, 1)[1] - want_loss) > 1e-3  # prompts would be learned as well


def test_parts_add_up_to_the_whole_batch(taken, alone):
    counts = alone.weights.sum(1)
    assert len(set(counts.tolist())) > 1, "means of parts would do"
    (want, want_loss), (got, got_loss) = taken(alone, 1), taken(alone, 4)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_the_loss_by_numpy():
    logits, weights = RNG.normal(size=(2, 5, 7)), np.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]])
    ids = RNG.integers(0, 7, (2, 5))
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms = [-log[b, t - 1, ids[b, t]] for b in range(2) for t in range(1, 5) if weights[b, t]]
    arrays = (logits.astype("f4"), ids.astype("i4"), weights.astype("f4"))
    value, count = loss.total(*map(jnp.asarray, arrays))
    np.testing.assert_allclose([value, count], [np.sum(terms), 4], rtol=1e-5)


def test_a_mesh_of_fsdp_and_tensor_changes_nothing(taken, alone, adapter):
    devices = mesh.mesh(2, 2)
    specs = mesh.specs(PARAMS, devices)
    params = jax.device_put(PARAMS, mesh.shardings(specs, PARAMS, devices))
    kernel = params["layers"]["ffn"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)
    split = jax.device_put(adapter, jl.specs(adapter, specs, devices))
    (want, want_loss), (got, got_loss) = taken(alone, 1), taken(alone, 1, params, split)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_a_mesh_that_does_not_divide_the_model_is_named():
    with pytest.raises(ValueError, match=r"got 4 x 4, expected at most 8 devices"):
        mesh.mesh(4, 4)
    with pytest.raises(ValueError, match=r"tensor: embed_tokens/embedding has an axis of 40"):
        shapes = jax.eval_shape(lambda: PARAMS)
        mesh.specs(
            shapes, jax.sharding.Mesh(np.array(jax.devices()[:3]).reshape(1, 3), ("fsdp", "tensor"))
        )


def test_a_quantised_base_in_bfloat16(taken, alone, adapter):
    """QLoRA: the step on codes is that on the weights they stand for, in bfloat16."""
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", quantize=4, quantize_block=8)
    params = bases.prepare(PARAMS, settings)
    codes = params["layers"]["ffn"]["up"]["kernel"]
    assert isinstance(codes, jl.Quantized) and codes.codes.dtype == jnp.uint8
    dense = jax.tree.map(
        lambda x: (x.dequantize() if isinstance(x, jl.Quantized) else x).astype(jnp.float32),
        params, is_leaf=lambda x: isinstance(x, jl.Quantized),
    )  # fmt: skip
    want, want_loss = taken(alone, 1, dense)
    state = step.initial(adapter.trainable, optax.sgd(1.0), 3)
    run = jax.jit(step.make(tuned(dtype="bfloat16"), optax.sgd(1.0)))
    state, report = run(params, adapter, state, stacked(alone, 1), jax.random.key(0))
    np.testing.assert_allclose(float(report.loss), want_loss, rtol=0.02)
    moved = lambda t: jax.tree.map(jnp.subtract, t, adapter.trainable)  # noqa: E731
    got, want = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(moved(t))])
        for t in (state.trainable, want)
    )
    assert got @ want > 0.98 * np.linalg.norm(got) * np.linalg.norm(want)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable))
    devices = mesh.mesh(2, 2)
    places = mesh.shardings(mesh.specs(PARAMS, devices), params, devices)
    split = jax.device_put(params, places)["layers"]["ffn"]["up"]["kernel"]
    assert split.codes.addressable_shards[0].data.shape == (2, 8, 2, 4)
    with pytest.raises(ValueError, match=r"quantize_block: got 24.*layers/"):
        odd = dataclasses.replace(settings, quantize_block=24)
        jax.eval_shape(functools.partial(bases.prepare, settings=odd), PARAMS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "Nothing"}, "method: got 'Nothing', expected one of"),
        ({"method": "TokenMask"}, "method: got 'TokenMask'"),
        ({"method": "IA3"}, "rank: got 8, expected 0"),
        ({"method_args": "{"}, "method_args: got '{', expected JSON"),
        ({"method_args": '{"rank": 3}'}, "method_args: got"),
        ({"method_args": '{"dropout": 2}'}, "LoRA: dropout: got 2"),
    ],
)
def test_methods_that_cannot_be_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        adapters.method(Settings(**change))


def test_methods_by_name():
    got = adapters.method(Settings(method="dora", rank=4, alpha=2.0))
    assert got == jl.DoRA(rank=4) and got.alpha == 2.0
    wet = adapters.method(Settings(method_args='{"dropout": 0.1, "freeze_a": true}'))
    assert wet == jl.LoRA(rank=8, freeze_a=True, dropout=0.1)
    assert adapters.method(Settings(method="IA3", rank=0, alpha=0.0)) == jl.IA3()


def test_the_schedule_rises_and_falls():
    from experiments.finetuning import optimizer

    rate = optimizer.schedule(Settings(lr=1.0, warmup=0.2, schedule="linear"), 10)
    rates = [float(rate(k)) for k in range(11)]
    np.testing.assert_allclose(rates[:3], [0.5, 1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(rates[10], 0.0, atol=1e-6)
    assert functools.reduce(lambda a, b: b if a >= b else -1, rates[2:]) == 0
