"""Which adapters the claim of ICM-LoRA compares, and what task vectors are made of."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import icm_lora as lib
from experiments.stages import accuracy, codec, conditions


@pytest.fixture
def zoo(tiny_world, tiny_encoded, monkeypatch):
    """The smallest zoo; accuracy is one minus the distance to the task's soup."""
    bank = codec.bank(tiny_encoded, accuracy.unpack(tiny_encoded, jnp.asarray(tiny_encoded.x)))
    vectors = lib.task_vectors(tiny_world, tiny_encoded.names)
    soups = lib.baselines.soups_of(tiny_encoded)

    def correct(world, encoded, task, tokens):
        soup = soups[encoded.names.index(task)]
        near = [1 - np.linalg.norm(x - soup) / np.linalg.norm(soup) for x in tokens]
        return np.asarray(near)[:, None]

    known = {"own adapters": (0.9,) * len(vectors), "soup": (1.0,) * len(vectors)}
    found = lib.Zoo(tiny_world, tiny_encoded, bank, vectors, known)
    monkeypatch.setattr(lib, "shared", lambda config, workdir: found)
    monkeypatch.setattr(lib.accuracy, "correct", correct)
    return found


def test_a_task_vector_is_the_mean_example_of_each_class(tiny_world, zoo):
    name = zoo.encoded.names[0]
    rows = conditions.examples(tiny_world, name)
    want = [tiny_world.embedding[rows.index[rows.label == side]].mean(0) for side in (0, 1)]
    np.testing.assert_allclose(zoo.vectors[0], np.concatenate(want), atol=1e-6)


def test_the_control_is_asked_for_another_task_and_bytes_are_counted(zoo, tmp_path):
    sizes = dataclasses.replace(lib.SIZES, channels=(4, 8), latent=4, steps=150, rate=5e-3)
    found = lib.figures(zoo.every.config, sizes, 0, tmp_path)
    assert found.units == zoo.encoded.names and found.baseline == (0.9,) * len(found.units)
    assert min(found.system) > 0.5 > 0.3 > max(found.control)
    numbers = sum(t[0].size for t in zoo.bank.trainable.values() for t in t.values())
    assert found.more["bytes of the zoo, one adapter per task"] == 4 * numbers * len(found.units)
    assert found.more["PCA and ridge: accuracy"] > 0.3
    assert found.more["soup: accuracy"] == 1.0
