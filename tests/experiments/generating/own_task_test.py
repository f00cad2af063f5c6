"""`jlora generate`: an ordinary adapter of one's own task, its rivals, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora as jl
from experiments.data import user
from experiments.generating import checkpoint, own_task
from experiments.stages import base_model, cross_validation, layered, rivals
from experiments.stages import world as world_lib
from experiments.workdir import digest, write_json
from jlora.cli.main import main
from jlora.generation.generators import layer_reading
from tests.experiments.generating.conftest import CONFIG

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = ["generated.json", "head.safetensors", "orbax", "peft"]
BIRDS = FIXTURES / "user_task" / "birds_or_mushrooms"


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A generator of random features, with a card: `run_test` makes one from texts."""
    folder = tmp_path_factory.mktemp("generator")
    base = base_model.load(CONFIG, None)
    nothing: Any = None
    found = checkpoint.Checkpoint(CONFIG, checkpoint.fingerprint(base.params), nothing, nothing)
    rng, depth, d = np.random.default_rng(0), CONFIG.layers, base.config.width
    rows = rng.normal(size=(80, depth, base.config.ffn))
    derivative = np.broadcast_to(np.eye(d), (depth, d, d))
    reading = layer_reading.reading(rows, rng.normal(size=(80, d)), derivative)
    fitted = layered.Fitted(reading, None)
    checkpoint.write(
        folder, dataclasses.replace(found, fitted=fitted, frozen=rivals.Frozen(1, 1.0, 1.0))
    )
    files = {p.name: digest(p) for p in folder.iterdir()}
    write_json(folder / checkpoint.CARD, {"files": files})
    return folder


@pytest.fixture(scope="module")
def birds(generator, tmp_path_factory):
    """(folder that was written, what was printed) of the task of two classes."""
    out = tmp_path_factory.mktemp("own") / "adapter"
    shown = own_task.run(BIRDS, out, generator, 0, None, False)
    return out, shown


def test_the_saved_adapter_and_head_give_the_figures_that_are_said(birds, generator):
    out, shown = birds
    about = json.loads((out / "generated.json").read_text())
    assert about["classes"] == ["birds", "mushrooms"] and about["examples_per_class"] == [2, 2]
    found, base = own_task.load(generator, None)
    (task,) = user.tasks(BIRDS)
    world = own_task.world_of(found, base, task, 2)
    names = jl.io.bert(layer_offset=about["first_layer"])
    peft = jl.io.load_peft(out / "peft", names, world.upper, layout="in_out")
    orbax = jl.io.restore_adapter(out / "orbax")
    head = load_file(out / "head.safetensors")["head"]
    texts, label = user.data(BIRDS).test
    hidden, mask, _ = base_model.states(base, list(texts), world.config, len(texts))
    model = world_lib.classifier(base.config, about["head_scale"])
    wide = jnp.broadcast_to(jnp.asarray(head), (len(texts), *head.shape))
    rows = []
    for adapter in (peft, jax.tree.map(jnp.asarray, orbax)):
        merged = jl.merge(world.upper, adapter)
        rows.append(np.asarray(model(merged, jnp.asarray(hidden), jnp.asarray(mask), wide)))
        assert (rows[-1].argmax(-1) == label).mean() == about["test"]["generated"]["mean"]
    np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-4)
    assert np.ptp(rows[0], axis=1).min() > 0, "the classes are told apart"
    assert any(f"{100 * about['test']['logreg']['mean']:.1f} %" in line for line in shown)


def test_the_first_line_says_what_to_use(birds):
    out, shown = birds
    about = json.loads((out / "generated.json").read_text())["cross_validation"]
    verdict = cross_validation.Verdict(**about)
    assert shown[0] == f"birds_or_mushrooms: {cross_validation.sentence(verdict)}."
    assert set(verdict.figures) == set(own_task.ORDER)
    assert verdict.n == 4 and str(out) in shown[-1]
    table = "\n".join(shown)
    for key in own_task.ORDER:
        assert own_task.names.method(key).label in table


def test_a_hidden_example_has_no_part_in_its_own_answer(generator, tmp_path):
    """Labels of hidden examples reversed: what is said of them is reversed, for every method."""
    found, base = own_task.load(generator, None)
    (task,) = user.tasks(BIRDS)
    world = own_task.world_of(found, base, task, 2)
    few = world.rows[task.name, "train"]
    (part, *_) = cross_validation.folds(few.label, CONFIG.data_seed)
    seen = []
    original = own_task.cross_validation.verdict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_validation, "folds", lambda label, seed: [part])
        patch.setattr(
            cross_validation, "verdict", lambda s, seed=0: (seen.append(s), original(s, seed))[1]
        )
        for flip in (False, True):
            label = few.label.copy()
            if flip:
                label[part.hidden] = 1 - label[part.hidden]
            rows = {**world.rows, (task.name, "train"): few._replace(label=label)}
            made = own_task.make(found, world._replace(rows=rows))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "stale").touch()
    own_task.save(made, world, tmp_path / "old")
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == FILES
    before, after = seen
    for key in own_task.ORDER:
        assert (before[key][part.hidden] + after[key][part.hidden] == 1).all(), key


def test_three_classes_and_pairs_of_texts_in_one_folder(generator, tmp_path, capsys):
    words = ["generate", f"--task_dir={FIXTURES / 'user_kinds'}", f"--out={tmp_path / 'both'}",
             f"--generator={generator}"]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "3 classes, 2 examples of each" in shown, "K of the generator where none is given"
    for name, classes in (("workshop_notes", 3), ("answers_or_not", 2)):
        folder = tmp_path / "both" / name
        assert load_file(folder / "head.safetensors")["head"].shape[0] == classes
        orbax = jl.io.restore_adapter(folder / "orbax")
        factor = orbax.trainable[layered.SITE]["a"]
        assert factor.shape[-1] == classes
    assert main(words) == 2 and "is there; expected a new folder" in capsys.readouterr().err
    (tmp_path / "both" / "workshop_notes" / "generated.json").unlink()
    assert main([*words, "--overwrite"]) == 2
    assert "is not of this command" in capsys.readouterr().err


def changed(tmp_path, edit):
    """A copy of the birds' task whose training rows were changed."""
    folder = tmp_path / "task"
    shutil.copytree(BIRDS, folder)
    path = folder / "train.jsonl"
    rows = edit([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def same_to_the_base(rows):
    """Texts that differ after the last of the 8 words that are read."""
    kept = "one two three four five six seven eight"
    return [row | {"text": f"{kept} {chr(97 + i) * 2}"} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda rows: [r for r in rows if r["label"] == "birds"], "no text of class 'mushrooms'"),
        (lambda rows: [r | {"text": "The same."} for r in rows], "the same text as"),
        (lambda rows: [rows[0] | {"text": float("nan")}, *rows[1:]], "non-empty text, got nan"),
        (same_to_the_base, "the examples of all classes are the same to the base"),
    ],
)
def test_texts_that_cannot_be_are_one_clear_error(generator, tmp_path, capsys, edit, said):
    folder = changed(tmp_path, edit)
    words = ["--task_dir", str(folder), "--out", str(tmp_path / "o"), "--generator", str(generator)]
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists(), "nothing half done is left"


def test_a_single_example_of_a_class_recommends_nothing(generator, tmp_path):
    folder = changed(
        tmp_path, lambda rows: [*rows[:1], *(r for r in rows if r["label"] != "birds")]
    )
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[0])["label"] == "birds"
    shown = own_task.run(folder, tmp_path / "o", generator, 0, None, False)
    assert "nothing is recommended" in shown[0] and "1 to 2 examples of each" in shown[1]


def test_a_generator_of_another_base_is_refused(generator, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(generator, other)
    (other / checkpoint.CARD).unlink()
    about = json.loads((other / checkpoint.CONFIG).read_text())
    (other / checkpoint.CONFIG).write_text(json.dumps(about | {"base_sha256": 64 * "0"}))
    words = ["--task_dir", str(BIRDS), "--out", str(tmp_path / "o"), "--generator", str(other)]
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert "is of another base" in error and error.count("\n") == 1
    weights = other / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:999])
    assert main(["generate", *words]) == 2
    assert "expected a safetensors file" in capsys.readouterr().err
