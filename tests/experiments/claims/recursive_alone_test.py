"""A model as large as a recursive one, trained alone: its size, its layers, its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import recursive_alone as file
from experiments.claims import relaxed_recursive as base
from jlora.models import decoder


@pytest.fixture
def world(monkeypatch):
    """A tiny decoder of six layers; text of a repeated sequence."""
    config = decoder.DecoderConfig(
        "llama", vocab=16, layers=6, width=16, heads=2, kv_heads=1, head_width=8, ffn=16,
        max_positions=16, tied=True, init_std=0.3,
    )  # fmt: skip
    params = decoder.init(jax.random.key(0), config)
    train = ((3 * np.arange(300)) % 16).astype(np.int32)
    rows = np.stack([train[:17], train[5:22]])
    found = base.World(config, params, train, ("one", "two"), rows, np.arange(2))
    monkeypatch.setattr(base, "world", lambda: found)
    for name, value in {"RANK": 2, "STEPS": 30, "LAST": 3, "BATCH": 4}.items():
        monkeypatch.setattr(base, name, value)
    return found


def test_sizes_are_equal_and_layers_are_the_base_s(world):
    shared, adapter = base.start_of("relaxed")
    params, own = file.start_of(file.ALONE)
    norms = 3 * 2 * world.config.width  # of the layers that share kernels
    assert base.size(shared) - norms == base.size(params)
    assert base.size(adapter.trainable) == base.size(own.trainable)
    for x, y in zip(jax.tree.leaves(params["layers"]), jax.tree.leaves(world.params["layers"]),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(x, np.asarray(y)[list(file.KEPT)])
    other, _ = file.start_of(file.RANDOM)
    kernel = other["layers"]["ffn"]["up"]["kernel"]
    assert not np.array_equal(kernel, params["layers"]["ffn"]["up"]["kernel"])


def test_it_learns_with_all_its_parameters(world):
    params, loss = file.trained.__wrapped__(file.ALONE, 1e-2, 0)
    before = file.measured(jax.tree.map(jnp.asarray, file.start_of(file.ALONE)[0]))
    after = file.measured(params)
    assert after.shape == (2,) and (after < before - 1).all() and loss < before.mean()
    start = file.start_of(file.ALONE)[0]
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), params, start)
    assert min(jax.tree.leaves(moved)) > 1e-3
