"""A user's task folders: read, checked, and refused with one clear error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.data import corpora, tasks, user
from experiments.data.user import TaskFolderError

EXAMPLE = Path(__file__).parent / "fixtures" / "user_task"
NAME = "birds_or_mushrooms"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(EXAMPLE / NAME, tmp_path / "tasks" / NAME))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_example():
    (task,) = user.tasks(EXAMPLE)
    assert user.tasks(EXAMPLE / NAME) == [task]
    assert (task.name, task.level, task.kind) == (NAME, "user", "folder")
    assert task.class_names == ("birds", "mushrooms")
    assert all(len(p) == 2 for p in task.paraphrases)
    got = tasks.data(task)
    assert [len(x[0]) for x in (got.train, got.validation, got.test)] == [16, 8, 16]
    for _, labels in (got.train, got.validation, got.test):
        assert labels.dtype == np.int32 and labels.mean() == 0.5
    assert got.train[0][0] == json.loads(lines(EXAMPLE / NAME / "train.jsonl")[0])["text"]
    assert "birds" not in "".join(corpora.SPECS)  # a subject that the zoo never saw


def test_defaults_and_number_labels(folder):
    meta = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(
        json.dumps({k: meta[k] for k in ("class_names", "class_descriptions")})
    )
    rows = [{"text": "only one", "label": 1}, {"text": "two of zero", "label": 0}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (task,) = user.tasks(folder.parent)
    assert task.name == NAME and task.paraphrases == ((), ())
    assert f"Class 1: {meta['class_descriptions'][1]}" in task.description
    assert tasks.data(task).train[1].tolist() == [1, 0]


def test_a_byte_order_mark_and_blank_lines_are_nothing(folder):
    (before,) = user.tasks(folder.parent)
    texts = user.data(folder)
    for path in folder.iterdir():
        lines = path.read_text().split("\n")
        blank = "\r\n  \n" if path.suffix == ".jsonl" else "\n"
        path.write_text(blank.join(lines) + blank, encoding="utf-8-sig")
    assert user.tasks(folder.parent) == [before]
    for got, want in zip(vars(user.data(folder)).values(), vars(texts).values(), strict=True):
        assert got[0] == want[0] and got[1].tolist() == want[1].tolist()


def test_lines_are_counted_as_an_editor_does_with_blank_ones(folder):
    path = folder / "test.jsonl"
    copy = lines(folder / "train.jsonl")[2]
    path.write_text("\n\n" + "\n".join([*lines(path)[:2], copy, *lines(path)[3:]]))
    with pytest.raises(TaskFolderError, match=r"test\.jsonl line 5: .* train\.jsonl line 3"):
        user.tasks(folder.parent)


def change_meta(folder, **changes):
    meta = json.loads((folder / "task.json").read_text())
    meta.update(changes)
    (folder / "task.json").write_text(json.dumps(meta))


def change_line(folder, line):
    path = folder / "test.jsonl"
    path.write_text("\n".join([*lines(path)[:4], line, *lines(path)[5:]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "task.json").unlink(),
            r"task\.json: missing, expected a JSON object",
        ),
        (
            lambda f: (f / "task.json").write_text("{"),
            r"task\.json: got no JSON .*, expected",
        ),
        (
            lambda f: (f / "task.json").write_text("[]"),
            r"task\.json: got list, expected",
        ),
        (lambda f: change_meta(f, colour="red"), "unknown key 'colour'; known:"),
        (lambda f: change_meta(f, class_names=["a"]), "'class_names' must be two non-empty texts"),
        (lambda f: change_meta(f, class_names=["a", "a"]), "are the same for both classes: 'a'"),
        (lambda f: change_meta(f, class_descriptions=["x", " "]), "'class_descriptions' must be"),
        (lambda f: change_meta(f, description=3), "'description' must be a non-empty text, got 3"),
        (lambda f: change_meta(f, name="!!"), "'name' has no letter or digit"),
        (lambda f: change_meta(f, paraphrases=["x"]), "'paraphrases' must be two lists"),
        (lambda f: (f / "test.jsonl").unlink(), r"test\.jsonl is missing; a task needs train"),
        (lambda f: (f / "test.jsonl").write_bytes(b"\xff\xfe"), r"test\.jsonl is not UTF-8"),
        (lambda f: change_line(f, "{text: 1}"), r"test\.jsonl line 5 is not JSON"),
        (lambda f: change_line(f, "[1]"), "line 5: expected an object with 'text' and 'label'"),
        (
            lambda f: change_line(f, '{"text": "", "label": 0}'),
            "line 5: 'text' must be a non-empty",
        ),
        (
            lambda f: change_line(f, '{"text": "x", "label": "fish"}'),
            r"line 5: unknown label 'fish'; known: \['birds', 'mushrooms'\] or 0 and 1",
        ),
        (lambda f: change_line(f, '{"text": "x", "label": true}'), "unknown label True"),
        (lambda f: change_line(f, '{"text": "x", "label": [0]}'), r"unknown label \[0\]"),
        (lambda f: (f / "test.jsonl").write_text(""), r"test\.jsonl: no text of class 'birds'"),
        (
            lambda f: (f / "test.jsonl").write_text('{"text": "x", "label": "birds"}'),
            r"test\.jsonl: no text of class 'mushrooms'; give at least one",
        ),
        (
            lambda f: change_line(f, lines(f / "train.jsonl")[2].replace("At dawn", "AT DAWN,")),
            r"test\.jsonl line 5: the same text as train\.jsonl line 3",
        ),
    ],
)
def test_bad_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(TaskFolderError, match=message):
        user.tasks(folder.parent)


def test_bad_task_dirs(tmp_path, folder):
    with pytest.raises(TaskFolderError, match="is not a folder"):
        user.tasks(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskFolderError, match="holds no task folder"):
        user.tasks(tmp_path / "empty")
    shutil.copytree(folder, folder.parent / "zz")
    with pytest.raises(TaskFolderError, match="name 'birds_or_mushrooms' is used twice"):
        user.tasks(folder.parent)


def test_validation_matters(folder, monkeypatch):
    """Mutation: without comparing normalised texts a copy in another split goes unnoticed."""
    change_line(folder, lines(folder / "train.jsonl")[2].replace("At dawn", "AT DAWN,"))
    monkeypatch.setattr(user, "normalise", lambda text: text)
    assert user.tasks(folder.parent)
