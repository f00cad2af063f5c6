"""A user's task folders: read, checked, and refused with one clear error."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.data import corpora, tasks, user
from experiments.data.task import parted
from experiments.data.user import TaskFolderError

EXAMPLE = Path(__file__).parent / "fixtures" / "user_task"
KINDS = Path(__file__).parent / "fixtures" / "user_kinds"
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


def as_csv(path: Path) -> Path:
    """A file of JSON lines as CSV."""
    rows = [json.loads(line) for line in lines(path)]
    table = path.with_suffix(".csv")
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    path.unlink()
    return table


def test_three_classes_and_pairs():
    pairs, three = user.tasks(KINDS)
    assert (pairs.name, three.name) == ("answers_or_not", "workshop_notes")
    assert pairs.classes == 2 and three.classes == 3 == len(three.members)
    assert three.description.startswith("Tell three classes of texts apart. Class 0: A note by")
    assert f"Class 2: {three.class_descriptions[2]}" in three.description
    got = tasks.data(three)
    assert got.train[1].tolist() == [0, 1, 2] * 4 and len(got.test[0]) == 12
    first = json.loads(lines(KINDS / "answers_or_not" / "train.jsonl")[0])
    text = tasks.data(pairs).train[0][0]
    assert parted(text) == (first["text"], first["text_b"])
    assert parted(got.train[0][0]) is None


@pytest.mark.parametrize("name", ["birds_or_mushrooms", "answers_or_not"])
def test_csv_is_read_like_json_lines(tmp_path, name):
    where = EXAMPLE if name == "birds_or_mushrooms" else KINDS
    before, copy = user.data(where / name), Path(shutil.copytree(where / name, tmp_path / name))
    for split in ("train", "test"):
        as_csv(copy / f"{split}.jsonl")
    for got, want in zip(vars(user.data(copy)).values(), vars(before).values(), strict=True):
        assert got[0] == want[0] and got[1].tolist() == want[1].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,class\nx,0\n", r"line 1: got columns \['text', 'class'\], expected text, label"),
        ("text,label\nx,0\nx,y,0\n", "line 3: got 3 fields, expected 2"),
        ('text,label\n"x,0\n', "is not CSV: unexpected end of data"),
        ("text,label\nx,0\n ,1\n", "line 3: 'text' must be a non-empty text, got ' '"),
        ("text,label\nx,7\n", r"line 2: unknown label 7; known: .* or 0 and 1"),
        ("text,text_b,label\nx,y,0\nz,w,1\n", r"test\.csv: got pairs, but train\.jsonl has single"),
        ("", r"line 1: got columns \[\]"),
    ],
)
def test_bad_csv(folder, content, message):
    (folder / "test.jsonl").unlink()
    (folder / "test.csv").write_text(content)
    with pytest.raises(TaskFolderError, match=message):
        user.tasks(folder.parent)


def test_a_class_without_examples_is_named(tmp_path):
    copy = Path(shutil.copytree(KINDS / "workshop_notes", tmp_path / "notes"))
    path = copy / "validation.csv"
    path.write_text("\n".join(x for x in lines(path) if not x.endswith(",bread")))
    with pytest.raises(TaskFolderError, match=r"validation\.csv: no text of class 'bread'; give"):
        user.tasks(copy)


def test_one_half_of_a_pair_may_be_in_several_pairs_but_no_pair_twice(tmp_path):
    copy = Path(shutil.copytree(KINDS / "answers_or_not", tmp_path / "pairs"))
    path = copy / "test.jsonl"
    row = json.loads(lines(copy / "train.jsonl")[0])
    path.write_text("\n".join([*lines(path), json.dumps(row | {"text": row["text"].upper()})]))
    with pytest.raises(
        TaskFolderError, match=r"test\.jsonl line 15: the same text as train\.jsonl"
    ):
        user.tasks(copy)
    path.write_text("\n".join([*lines(path)[:-1], json.dumps(row | {"text": "And how much?"})]))
    assert len(user.data(copy).test[0]) == 15


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
        (
            lambda f: change_meta(f, class_names=["a"]),
            r"task\.json: 'class_names' must be 2 to 20 non-empty texts, got 1: \['a'\]",
        ),
        (
            lambda f: change_meta(f, class_names=[f"c{k}" for k in range(21)]),
            "'class_names' must be 2 to 20 non-empty texts, got 21: ",
        ),
        (
            lambda f: change_meta(f, class_names=["a", "A "]),
            "'class_names' are the same for several classes: 'a'",
        ),
        (
            lambda f: change_meta(f, class_names=["a", "b", "c"]),
            "got 2 'class_descriptions', expected 3, one per class name",
        ),
        (lambda f: change_meta(f, class_descriptions=["x", " "]), "'class_descriptions' must be"),
        (lambda f: change_meta(f, description=3), "'description' must be a non-empty text, got 3"),
        (lambda f: change_meta(f, name="!!"), "'name' has no letter or digit"),
        (lambda f: change_meta(f, paraphrases=["x"]), "'paraphrases' must be 2 lists"),
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
        (lambda f: change_line(f, '{"text": "x", "label": 2}'), "unknown label 2; .* or 0 and 1"),
        (
            lambda f: change_line(f, '{"text": "x", "text_b": "y", "label": 0}'),
            r"test\.jsonl line 5: got a 'text_b', unlike line 1; a task has pairs or single texts",
        ),
        (
            lambda f: change_line(f, '{"text": "x [SEP] y", "label": 0}'),
            r"line 5: 'text' holds \[SEP\], which parts a pair",
        ),
        (
            lambda f: (f / "test.csv").write_text("text,label\n"),
            r"test\.csv: test\.jsonl is there too; keep one of them",
        ),
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
