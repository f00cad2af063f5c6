"""A user's own tasks: one folder per task, joined to the zoo or given a generated adapter.

A task folder holds ``task.json`` and ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``::

    task.json   {"description": "...", "class_names": ["a", "b"],
                 "class_descriptions": ["A text about ...", "A text about ..."]}
    *.jsonl     {"text": "...", "label": "a"}      one line per text; label: class name, or 0 or 1

``name`` (default: the folder's name), ``description`` (default: made of the class descriptions)
and ``paraphrases`` (two lists of other wordings) are optional. ``train.jsonl`` may be as short as
one text per class when the adapter is to be generated, not trained.

Everything is checked before anything is used; ``TaskFolderError`` names file, line and remedy.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.corpora import normalise
from experiments.data.task import SPLITS, Task, TaskData, Texts, describe, slug
from jlora.io import FormatError
from jlora.io.json_file import read_json

_KEYS = {"name", "description", "class_names", "class_descriptions", "paraphrases"}


class TaskFolderError(ValueError):
    """A task folder is not as it must be; the message says where and what to do."""


def tasks(task_dir: str | os.PathLike) -> list[Task]:
    """The tasks of ``task_dir`` in the order of their folder names; all files are checked."""
    root = Path(task_dir)
    if not root.is_dir():
        raise TaskFolderError(f"{root} is not a folder; give a folder with one folder per task")
    if (root / "task.json").is_file():
        folders = [root]
    else:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise TaskFolderError(f"{root} holds no task folder (a folder with a task.json)")
    found = [_task(folder) for folder in folders]
    names = [task.name for task in found]
    for task, folder in zip(found, folders, strict=True):
        if names.count(task.name) > 1:
            raise TaskFolderError(f"{folder / 'task.json'}: name {task.name!r} is used twice")
        data(folder)
    return found


def data(folder: str | os.PathLike) -> TaskData:
    """Texts and labels as the files say, every text once."""
    folder = Path(folder)
    names = _meta(folder)["class_names"]
    read = {split: _read(folder / f"{split}.jsonl", names) for split in SPLITS}
    first: dict[str, str] = {}
    for split in SPLITS:
        (texts, _), numbers = read[split]
        for number, text in zip(numbers, texts, strict=True):
            key = normalise(text) or text
            here = f"{split}.jsonl line {number}"
            if key in first:
                raise TaskFolderError(
                    f"{folder / (split + '.jsonl')} line {number}: the same text as "
                    f"{first[key]} (case, digits and punctuation aside); keep one of them"
                )
            first[key] = here
    return TaskData(**{split: rows for split, (rows, _) in read.items()})


def _task(folder: Path) -> Task:
    meta = _meta(folder)
    first, second = meta["class_names"]
    descriptions = (meta["class_descriptions"][0], meta["class_descriptions"][1])
    other = meta.get("paraphrases", ((), ()))
    name = slug(meta.get("name", folder.resolve().name))
    if not name:
        raise TaskFolderError(f"{folder / 'task.json'}: 'name' has no letter or digit")
    return Task(
        name=name,
        corpus=name,
        level="user",
        description=meta.get("description") or describe("texts", descriptions),
        class_names=(first, second),
        class_descriptions=descriptions,
        paraphrases=(tuple(other[0]), tuple(other[1])),
        kind="folder",
        members=(((name, first),), ((name, second),)),
        source=f"folder:{folder.resolve()}",
    )


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "task.json"
    try:
        meta = read_json(path)
    except FormatError as error:
        raise TaskFolderError(f"{error} that describes the task") from error
    if strange := sorted(set(meta) - _KEYS):
        raise TaskFolderError(f"{path}: unknown key {strange[0]!r}; known: {sorted(_KEYS)}")
    for key in ("class_names", "class_descriptions"):
        value: Any = meta.get(key)
        if not _is_texts(value) or len(value) != 2:
            raise TaskFolderError(f"{path}: {key!r} must be two non-empty texts, got {value!r}")
        if value[0] == value[1]:
            raise TaskFolderError(f"{path}: {key!r} are the same for both classes: {value[0]!r}")
    for key in ("name", "description"):
        if key in meta and not _is_texts([meta[key]]):
            raise TaskFolderError(f"{path}: {key!r} must be a non-empty text, got {meta[key]!r}")
    other = meta.get("paraphrases", ((), ()))
    if not isinstance(other, list | tuple) or len(other) != 2 or not all(map(_is_texts, other)):
        raise TaskFolderError(f"{path}: 'paraphrases' must be two lists of texts, got {other!r}")
    return meta


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, str) and x.strip() for x in value)


def _read(path: Path, names: list[str]) -> tuple[Texts, list[int]]:
    """Texts with labels, and the number of the line of each; a BOM and blank lines are nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise TaskFolderError(f"{path} is missing; a task needs {', '.join(SPLITS)}") from None
    except UnicodeDecodeError as error:
        raise TaskFolderError(f"{path} is not UTF-8: {error}") from error
    texts: list[str] = []
    labels: list[int] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskFolderError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not {"text", "label"} <= set(row):
            raise TaskFolderError(f"{where}: expected an object with 'text' and 'label'")
        if not _is_texts([row["text"]]):
            raise TaskFolderError(f"{where}: 'text' must be a non-empty text, got {row['text']!r}")
        label = row["label"]
        if label in names and isinstance(label, str):
            labels.append(names.index(label))
        elif label in (0, 1) and not isinstance(label, bool | float):
            labels.append(int(label))
        else:
            raise TaskFolderError(f"{where}: unknown label {label!r}; known: {names} or 0 and 1")
        texts.append(row["text"].strip())
        numbers.append(number)
    for index, name in enumerate(names):
        if index not in labels:
            raise TaskFolderError(f"{path}: no text of class {name!r}; give at least one")
    return (texts, np.asarray(labels, dtype=np.int32)), numbers
