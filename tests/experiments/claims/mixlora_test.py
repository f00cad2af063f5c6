"""The marked model is the encoder; every site is adapted; a shuffled router is another function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import mixlora as lib
from experiments.claims import routed_text
from experiments.stages.world import classifier
from jlora.models import encoder

CONFIG = encoder.EncoderConfig(
    vocab=16, width=8, layers=2, heads=2, ffn=12, max_positions=8, segments=1
)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    params = encoder.Encoder(CONFIG).init(jax.random.key(0), ids, mask)["params"]
    upper = {"layers": jax.tree.map(lambda t: t + 0.1 * f32(*t.shape), params["layers"])}
    mask = jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    index, label = (jnp.asarray(rng.integers(0, n, (1, 4)), jnp.int32) for n in (3, 2))
    return lib.Mix(lib.classifier(CONFIG, 4.0), lambda *a: a[1], upper, ("a",), index, label,
                   f32(1, 2, 8), f32(3, 3, 8), mask, (index, label), (index, label))  # fmt: skip


def logits(data, adapter):
    heads = jnp.broadcast_to(data.heads[0], (3, 2, 8))
    inputs = data.hidden, data.mask, heads
    return np.asarray(jax.jit(jl.lift(data.apply))(data.base, adapter, *inputs))


def test_without_an_adapter_it_is_the_encoder(data):
    inputs = data.hidden, data.mask, jnp.broadcast_to(data.heads[0], (3, 2, 8))
    want = jax.jit(classifier(CONFIG, 4.0))(data.base, *inputs)
    got = logits(data, lib.fresh(data, lib.OURS, 0))
    np.testing.assert_allclose(got, want, atol=2e-6)
    down = data.base["layers"]["ffn"]["down"]
    ffn = data.base["layers"]["ffn"] | {"down": down | {"bias": 2 * down["bias"]}}
    twice = {"layers": data.base["layers"] | {"ffn": ffn}}
    other = jax.jit(classifier(CONFIG, 4.0))(twice, *inputs)
    assert np.abs(got - other).max() > 1e-3  # a bias that each of two experts adds would be seen


def test_every_kernel_is_adapted_and_the_counts_are_equal(data):
    d, f = CONFIG.width, CONFIG.ffn
    for setting, want in [
        (lib.OURS, 4 * 2 * d * 8 + 8 * 2 * (d + f) * 2 + 8 * d),
        (lib.DENSE, 13 * (4 * 2 * d + 2 * (d + f))),
    ]:
        adapter = lib.fresh(data, setting, 0)
        assert set(adapter.trainable) == {*routed_text.SITES, *lib.FFN}
        assert sum(t[0].size for t in jax.tree.leaves(adapter.trainable)) == want
    assert 4 * 2 * 384 * 8 + 8 * 2 * 1920 * 2 + 8 * 384 == 89_088
    assert 13 * (4 * 2 * 384 + 2 * 1920) == 89_856  # MiniLM's layer


def test_trained_it_reports_balance_and_shuffled_it_is_another_function(data):
    short = dataclasses.replace(lib.recipe(lib.OURS), steps=4)
    start = lib.fresh(data, lib.OURS, 0)
    adapter, losses = routed_text.train(data, short, start, 0.05, 0)
    assert np.isfinite(losses).all() and losses[-1] != losses[0]
    router = "layers/ffn/up/kernel"
    assert np.abs(adapter.trainable[router]["router"] - start.trainable[router]["router"]).max() > 0
    assert np.abs(logits(data, adapter) - logits(data, routed_text.shuffled(adapter))).max() > 1e-4
