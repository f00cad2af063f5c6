"""The layered generator of a world: what is read, what is written, what is remembered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.stages import last_layer, layered, world
from experiments.stages.world import classifier
from jlora.models import encoder
from tests.experiments.conftest import TINY


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The tiny world with adapters on both layers: lower ones are read and written too."""
    config = dataclasses.replace(TINY, layers=2)
    return world.build(config, tmp_path_factory.mktemp("both"), None)


def test_features_are_those_of_the_last_layer_and_embeddings_those_of_the_base(both):
    index = np.arange(13)
    found = layered.read(both, index)
    depth = both.config.layers
    assert found.features.shape == (13, depth, both.model.ffn)
    last = last_layer.features(both, index)
    np.testing.assert_allclose(found.features[:, -1], last, rtol=1e-4, atol=1e-5)
    one = world.World(*both)._replace(upper=encoder.split(both.upper, 1)[0])
    first = last_layer.features(one, index)
    np.testing.assert_allclose(found.features[:, 0], first, rtol=1e-4, atol=1e-5)
    assert depth == 2 and np.abs(first - last).max() > 1e-2
    want = last_layer.embeddings(both, index)
    np.testing.assert_allclose(found.embeddings, want, rtol=1e-4, atol=1e-5)


def test_the_derivative_is_that_of_a_bias(both, bar):
    """A constant added before the last norm of a layer is a change of its output's bias."""
    row, size = 3, 0.02
    (found,) = (layered.derivatives(both, np.asarray([row]), bar),)
    assert bar.count == 1
    given = both.hidden[row : row + 1], both.mask[row : row + 1]

    def embedding(bias):
        ffn = both.upper["layers"]["ffn"]
        down = {**ffn["down"], "bias": bias}
        upper = {"layers": {**both.upper["layers"], "ffn": {**ffn, "down": down}}}
        out = encoder.run(upper, *given, both.model)
        return np.asarray(encoder.mean_pool(out, given[1])[0], "f8")

    start, rng = both.upper["layers"]["ffn"]["down"]["bias"], np.random.default_rng(0)
    for k in range(len(start)):
        along = rng.normal(size=start.shape[1]).astype("f4")
        along /= np.linalg.norm(along)
        moved = [embedding(start.at[k].add(sign * size * along)) for sign in (1, -1)]
        slope = (moved[0] - moved[1]) / (2 * size)
        np.testing.assert_allclose(found[k] @ along, slope, atol=0.02 * np.abs(slope).max())


@pytest.fixture(scope="module")
def fitted(both):
    """Of the seen tasks, with a derivative that is cheap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layered, "TURNED", 2)
        return layered.fit(both, both.names("seen"), Counted())


class Counted:
    """A bar."""

    def step(self, count):
        """Nothing is shown."""


def test_answers_are_those_of_the_adapter_lifted(both, fitted):
    name = both.names("seen")[0]
    rows, head = both.rows[name, "train"], both.head_of(name)
    features = layered.read(both, rows.index).features
    a, b = layered.factors(both, fitted, features, rows.label, head)
    adapter = layered.adapter(both, a, b)
    model = classifier(both.model, both.config.head_scale)
    given = both.hidden[rows.index], both.mask[rows.index]
    wide = jnp.broadcast_to(jnp.asarray(head), (len(rows.index), *head.shape))
    logits = jax.jit(jl.lift(model))(both.upper, adapter, *given, wide)
    want = np.asarray(logits).argmax(1) == rows.label
    hits = layered.right(both, rows, head)
    np.testing.assert_array_equal(hits(a, b), want)
    assert hits(a, b).mean() > 0.75 > hits(a, -b).mean(), "its own examples are learned"


def test_classes_that_are_remembered(both, fitted):
    names = both.names("seen")
    own = layered.classes(both, names)
    assert fitted.known is not None and len(own) == len(fitted.known.rows)
    labels = {m for n in names for m in both.task(n).members if len(m) == 1}
    assert len(own) == len(labels)
    texts = np.concatenate(own)
    assert len(texts) == len(set(texts.tolist())), "a text is of one class"
    held = [n for n in both.names("unseen_label") if n not in names]
    both = layered.classes(both, [*names, *held])
    assert len(both) > len(own), "labels of held-out tasks are not among them"


def test_few_classes_are_not_remembered(both, monkeypatch):
    monkeypatch.setattr(layered, "TURNED", 1)
    name = both.names("seen")[0]
    assert layered.fit(both, [name], Counted()).known is None
