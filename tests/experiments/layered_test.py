"""The layered generator of a world: what is read, what is written, what is remembered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.stages import last_layer, layered
from experiments.stages.world import classifier
from jlora.models import encoder


def test_features_are_those_of_the_last_layer_and_embeddings_those_of_the_base(tiny_world):
    index = np.arange(13)
    found = layered.read(tiny_world, index)
    depth = tiny_world.config.layers
    assert found.features.shape == (13, depth, tiny_world.model.ffn)
    last = last_layer.features(tiny_world, index)
    np.testing.assert_allclose(found.features[:, -1], last, rtol=1e-4, atol=1e-5)
    assert depth == 1 or np.abs(found.features[:, 0] - last).max() > 1e-2
    want = last_layer.embeddings(tiny_world, index)
    np.testing.assert_allclose(found.embeddings, want, rtol=1e-4, atol=1e-5)


def test_the_derivative_is_that_of_a_bias(tiny_world, bar):
    """A constant added before the last norm of a layer is a change of its output's bias."""
    row, size = 3, 0.02
    (found,) = (layered.derivatives(tiny_world, np.asarray([row]), bar),)
    assert bar.count == 1
    given = tiny_world.hidden[row : row + 1], tiny_world.mask[row : row + 1]

    def embedding(bias):
        ffn = tiny_world.upper["layers"]["ffn"]
        down = {**ffn["down"], "bias": bias}
        upper = {"layers": {**tiny_world.upper["layers"], "ffn": {**ffn, "down": down}}}
        out = encoder.run(upper, *given, tiny_world.model)
        return np.asarray(encoder.mean_pool(out, given[1])[0], "f8")

    start, rng = tiny_world.upper["layers"]["ffn"]["down"]["bias"], np.random.default_rng(0)
    for k in range(len(start)):
        along = rng.normal(size=start.shape[1]).astype("f4")
        along /= np.linalg.norm(along)
        moved = [embedding(start.at[k].add(sign * size * along)) for sign in (1, -1)]
        slope = (moved[0] - moved[1]) / (2 * size)
        np.testing.assert_allclose(found[k] @ along, slope, atol=0.02 * np.abs(slope).max())


@pytest.fixture(scope="module")
def fitted(tiny_world):
    """Of the seen tasks, with a derivative that is cheap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layered, "TURNED", 2)
        return layered.fit(tiny_world, tiny_world.names("seen"), Counted())


class Counted:
    """A bar."""

    def step(self, count):
        """Nothing is shown."""


def test_answers_are_those_of_the_adapter_lifted(tiny_world, fitted):
    name = tiny_world.names("seen")[0]
    rows, head = tiny_world.rows[name, "train"], tiny_world.head_of(name)
    features = layered.read(tiny_world, rows.index).features
    a, b = layered.factors(tiny_world, fitted, features, rows.label, head)
    adapter = layered.adapter(tiny_world, a, b)
    model = classifier(tiny_world.model, tiny_world.config.head_scale)
    given = tiny_world.hidden[rows.index], tiny_world.mask[rows.index]
    wide = jnp.broadcast_to(jnp.asarray(head), (len(rows.index), *head.shape))
    logits = jax.jit(jl.lift(model))(tiny_world.upper, adapter, *given, wide)
    want = np.asarray(logits).argmax(1) == rows.label
    hits = layered.right(tiny_world, rows, head)
    np.testing.assert_array_equal(hits(a, b), want)
    assert hits(a, b).mean() > 0.75 > hits(a, -b).mean(), "its own examples are learned"


def test_classes_that_are_remembered(tiny_world, fitted):
    names = tiny_world.names("seen")
    own = layered.classes(tiny_world, names)
    assert fitted.known is not None and len(own) == len(fitted.known.rows)
    labels = {m for n in names for m in tiny_world.task(n).members if len(m) == 1}
    assert len(own) == len(labels)
    texts = np.concatenate(own)
    assert len(texts) == len(set(texts.tolist())), "a text is of one class"
    held = [n for n in tiny_world.names("unseen_label") if n not in names]
    both = layered.classes(tiny_world, [*names, *held])
    assert len(both) > len(own), "labels of held-out tasks are not among them"


def test_few_classes_are_not_remembered(tiny_world, monkeypatch):
    monkeypatch.setattr(layered, "TURNED", 1)
    name = tiny_world.names("seen")[0]
    assert layered.fit(tiny_world, [name], Counted()).known is None
