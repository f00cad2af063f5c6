"""A tiny generator from texts to a checked folder: what is written is what was computed."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.generating import card, checkpoint, measure, run
from experiments.stages import base_model, layered, world
from experiments.workdir import StageError
from tests.experiments.generating.conftest import CONFIG


class Counted:
    """A bar that shows nothing."""

    def step(self, count):
        """A step is done."""


@pytest.fixture(scope="module")
def built(tiny_generator):
    """The world of the run."""
    return world.build(CONFIG, tiny_generator.workdir, None)


def test_the_card_has_every_method_on_every_held_out_task(tiny_generator, built):
    workdir, about = tiny_generator
    held = [t.name for t in built.tasks if t.level != "seen"]
    assert set(about["accuracy"]) == set(held) != set()
    assert set(about["seen"]) == set(built.names("seen")) != set()
    for row in about["accuracy"].values():
        assert set(measure.KEYS) == set(row) - {"level"}
        assert len(row["generated"]) == measure.DRAWS and len(row["lora_k"]) == 1
    page = (workdir / run.RESULT / checkpoint.PAGE).read_text()
    assert page == card.page(about) and all(label in page for label in card.LABELS.values())
    assert about == json.loads((workdir / run.RESULT / checkpoint.CARD).read_text())


def test_a_lead_is_over_the_same_tasks_and_draws():
    rows = {
        "x": {"level": "l", "generated": [0.9, 0.5], "logreg": [0.6, 0.6], "lora_k": [0.8]},
        "y": {"level": "l", "generated": [0.7, 0.7], "logreg": [0.5, 0.7]},
    }
    found = card.levels(rows)["l"]
    assert found["means"]["generated"] == {"mean": 0.7, "tasks": 2}
    assert found["leads"]["logreg"]["mean"] == pytest.approx(0.1)
    assert found["leads"]["lora_k"]["mean"] == pytest.approx(0.1), "of its own draw"


def test_draws_differ_and_hold_k_texts_of_each_class(built):
    name = built.names("seen")[0]
    found = [measure.drawn(built, name, k) for k in range(6)]
    rows = built.rows[name, "train"]
    side = dict(zip(rows.index.tolist(), rows.label.tolist(), strict=True))
    for few in found:
        assert np.bincount(few.label).tolist() == [2, 2]
        assert [side[i] for i in few.index.tolist()] == few.label.tolist()
    assert len({tuple(few.index.tolist()) for few in found}) > 1


def test_the_files_hold_what_was_computed(tiny_generator, built):
    got = checkpoint.read(tiny_generator.workdir / run.RESULT)
    want = layered.fit(built, built.names("seen"), Counted())
    assert want.known is not None and got.fitted.known is not None
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got.fitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(a).max())
    assert got.base_sha256 == checkpoint.fingerprint(base_model.load(CONFIG, None).params)
    name = built.names("seen")[0]
    few, head = measure.drawn(built, name, 0), built.head_of(name)
    features = layered.read(built, few.index).features
    made = [layered.factors(built, x, features, few.label, head) for x in (want, got.fitted)]
    delta, other = (np.asarray(a @ b) for a, b in made)
    assert np.abs(delta - other).max() < 0.05 * np.abs(delta).max() > 0


def test_a_generator_without_a_memory_is_written_and_read(tiny_generator, tmp_path):
    fitted = checkpoint.read(tiny_generator.workdir / run.RESULT).fitted._replace(known=None)
    checkpoint.save(tmp_path / "one", fitted)
    again = checkpoint.restore(tmp_path / "one")
    assert again.known is None
    jax.tree.map(np.testing.assert_array_equal, again.reading, fitted.reading)


def test_another_base_has_another_fingerprint():
    params = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    own = checkpoint.fingerprint(params)
    assert own == checkpoint.fingerprint(dict(reversed(params.items())))
    for other in (
        params | {"a": np.zeros((3, 2), np.float32)},
        params | {"b": np.array([1, 1, 1, 1.0000001], np.float32)},
        {"a": params["a"], "c": params["b"]},
    ):
        assert checkpoint.fingerprint(other) != own


def edited(folder, tmp_path, change, keep_card=False):
    """A copy of the generator whose tensors were changed."""
    target = tmp_path / "other"
    shutil.copytree(folder, target)
    tensors = load_file(target / checkpoint.WEIGHTS)
    change(tensors)
    save_file(tensors, target / checkpoint.WEIGHTS)
    if not keep_card:
        (target / checkpoint.CARD).unlink()
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("reading/turn"), "got other tensors than expected: reading/turn"),
        (
            lambda t: t.update({"reading/length": np.full((), np.nan, np.float32)}),
            "reading/length: got NaN",
        ),
        (lambda t: t.update({"reading/size": np.ones(3, np.float32)}), "reading/size: got shape"),
        (lambda t: t.update({"known/axes": np.ones((3, 2), np.float16)}), "known/axes: got shape"),
        (lambda t: t.update({"reading/mean": np.ones((), np.float32)}), "reading/mean: got shape"),
    ],
)
def test_tensors_that_cannot_be_are_one_clear_error(tiny_generator, tmp_path, change, said):
    with pytest.raises(StageError, match=said) as caught:
        checkpoint.read(edited(tiny_generator.workdir / run.RESULT, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_those_of_the_card_are_refused(tiny_generator, tmp_path):
    folder = tiny_generator.workdir / run.RESULT
    moved = edited(
        folder, tmp_path, lambda t: t.update({"reading/mean": t["reading/mean"] + 1}), True
    )
    with pytest.raises(StageError, match=r"sha256: got .*, expected"):
        checkpoint.read(moved)
    (moved / checkpoint.CARD).unlink()
    weights = moved / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StageError, match="expected a safetensors file") as caught:
        checkpoint.read(moved)
    assert "\n" not in str(caught.value)
    with pytest.raises(StageError, match="got no folder"):
        checkpoint.read(tmp_path / "nowhere")
    about = json.loads((moved / checkpoint.CONFIG).read_text())
    (moved / checkpoint.CONFIG).write_text(json.dumps(about | {"format": 1}))
    with pytest.raises(StageError, match="format: got 1, expected 2"):
        checkpoint.read(moved)


def test_measured_tasks_are_of_every_level(built):
    levels = [built.task(name).level for name in measure.spread(built, 1)]
    assert len(levels) == len(set(levels)) == len({t.level for t in built.tasks} - {"seen"})
    every = measure.spread(built, 0)
    assert set(every) == {t.name for t in built.tasks if t.level != "seen"}


def test_a_run_without_a_seen_task_is_refused(tiny_generator, built, monkeypatch):
    none = built._replace(tasks=tuple(t for t in built.tasks if t.level != "seen"))
    monkeypatch.setattr(world, "build", lambda *given: none)
    with pytest.raises(StageError, match="without a seen task"):
        run.run(CONFIG, tiny_generator.workdir)
