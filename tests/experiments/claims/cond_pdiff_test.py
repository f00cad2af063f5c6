"""Which figures the claim of Cond P-Diff compares, and what its rivals know."""

import dataclasses

import numpy as np
import pytest

from experiments.claims import cond_pdiff as lib
from experiments.pipeline import Context
from experiments.stages import sample


def tokens(encoded, share):
    """An adapter that `hits` takes for one of that accuracy."""
    return np.full(encoded.x.shape[1:], share, np.float32)


@pytest.fixture
def hits(monkeypatch):
    """Accuracy is what is written into an adapter's tokens."""

    def correct(world, encoded, task, tokens):
        return np.arange(100)[None] < np.round(100 * tokens[:, 0, 0])[:, None]

    monkeypatch.setattr(lib.accuracy, "correct", correct)


def test_figures_are_those_of_the_seed_and_the_zoo_stays(
    tiny_world, tiny_encoded, hits, monkeypatch, tmp_path
):
    names, seen = tiny_encoded.names, []
    products = {"data": tiny_world, "codec": tiny_encoded}
    monkeypatch.setattr(lib, "shared", lambda config, workdir: Context(
        config, workdir, products=products))  # fmt: skip

    def train(context):
        seen.append((context.config.seed, context.products["data"].config.seed))
        return "trained"

    monkeypatch.setattr(lib.denoiser, "STAGE", dataclasses.replace(lib.denoiser.STAGE))
    monkeypatch.setattr(type(lib.denoiser.STAGE), "run", lambda stage, context: train(context))

    def generated(world, encoded, trained):
        assert trained == "trained"
        share = {"generated": (0.9, 0.7), "shuffled": (0.5,), "pdiff_global": (0.6,)}
        return {k: {t: np.stack([tokens(encoded, s) for s in v]) for t in names}
                for k, v in share.items()}  # fmt: skip

    monkeypatch.setattr(lib, "generated", generated)
    monkeypatch.setattr(lib, "without_seed", lambda *_: {"soup": (0.85,) * len(names)})
    monkeypatch.setattr(lib, "interpolated", lambda *_: {"kernel ridge": (0.8,) * len(names)})
    found = lib.figures(tiny_world.config, 7, tmp_path)
    assert seen == [(7, 7)] and tiny_world.config.seed == 0
    assert found.units == names
    assert found.system == pytest.approx([0.8] * len(names))  # the mean over samples
    assert found.baseline == (0.85,) * len(names)
    assert found.control == pytest.approx([0.5] * len(names))
    want = {"generated": 0.8, "shuffled": 0.5, "pdiff_global": 0.6, "soup": 0.85,
            "kernel ridge": 0.8}  # fmt: skip
    assert found.more == pytest.approx({f"{k}: accuracy": v for k, v in want.items()})


def test_the_control_asks_for_another_task(tiny_world, tiny_encoded, monkeypatch):
    world = tiny_world._replace(config=dataclasses.replace(tiny_world.config, samples=2))
    order = list(tiny_encoded.names)

    def inputs(world, trained, requests):
        return ([tokens(tiny_encoded, order.index(r.asked)) for r in requests],)

    class Trained:
        params = fixed = None

    monkeypatch.setattr(sample, "inputs", inputs)
    monkeypatch.setattr(sample, "generator_sampler", lambda *_: lambda p, f, given: given)
    monkeypatch.setattr(sample, "pdiff_batches", lambda w, e, t, variant: [sample.Batch(
        lambda x: x, [np.stack([tokens(tiny_encoded, 9)] * 4)], 4, [(n, variant) for n in order])
    ])  # fmt: skip
    world = world._replace(tasks=tuple(t for t in world.tasks if t.name in order))
    found = lib.generated(world, tiny_encoded, Trained())
    assert found.keys() == {"generated", "shuffled", "pdiff_global", "pdiff_task"}
    for k, name in enumerate(order):
        assert (found["generated"][name] == k).all() and len(found["generated"][name]) == 2
        assert (found["shuffled"][name] != k).all()
        assert (found["pdiff_task"][name] == 9).all()


def test_rivals_know_the_texts_of_the_condition_alone(tiny_world):
    config, name = tiny_world.config, tiny_world.names("seen")[0]
    train, given = tiny_world.rows[name, "train"], []

    def predict(x, y, test):
        given.append((x, y))
        return tiny_world.rows[name, "test"].label

    assert lib.rival(tiny_world, name, predict) == 1.0
    ((x, y),) = given
    assert (
        len(x) == 2 * config.examples and list(y) == [0] * config.examples + [1] * config.examples
    )
    # the mean that the condition holds is the mean of these texts
    want = lib.conditions.canonical(tiny_world, [name])[0]
    np.testing.assert_allclose(x[y == 0].mean(0), want[1], rtol=1e-6)
    np.testing.assert_allclose(x[y == 1].mean(0), want[3], rtol=1e-6)
    assert len(train.label) > len(y)


@pytest.mark.parametrize("predict", lib.RIVALS.values(), ids=lib.RIVALS)
def test_rivals_separate_two_clouds(predict):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 8)
    x = rng.normal(size=(16, 3)) * 0.2 + y[:, None]
    test = np.asarray([[0.1, 0.0, 0.0], [1.0, 0.9, 1.1]])
    assert list(predict(x, y, test)) == [0, 1]
    assert list(predict(x, 1 - y, test)) == [1, 0]
