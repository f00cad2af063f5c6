"""A user's own tasks: one folder per task, joined to the zoo or given a generated adapter.

A task folder holds ``task.json`` and ``train``, ``validation`` and ``test`` as ``.jsonl`` or
``.csv`` (`user_rows`)::

    task.json   {"description": "...", "class_names": ["a", "b"],
                 "class_descriptions": ["A text about ...", "A text about ..."]}
    *.jsonl     {"text": "...", "label": "a"}      one line per text; label: class name, or number

Two to twenty classes; a task of pairs has a second text, ``text_b``, in every row. ``name``
(default: the folder's name), ``description`` (default: made of the class descriptions) and
``paraphrases`` (a list per class of other wordings) are optional. ``train`` may be as short as one
text per class when the adapter is to be generated, not trained.

Everything is checked before anything is used; ``TaskFolderError`` names file, line and remedy.
"""

import os
from pathlib import Path
from typing import Any

from experiments.data import user_rows
from experiments.data.corpora import normalise
from experiments.data.task import FEWEST, MOST, SPLITS, Task, TaskData, describe, parted, slug
from experiments.data.user_rows import TaskFolderError, is_texts
from jlora.io import FormatError
from jlora.io.json_file import read_json

__all__ = ["TaskFolderError", "data", "tasks"]

_KEYS = {"name", "description", "class_names", "class_descriptions", "paraphrases"}


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
    result = [_task(folder) for folder in folders]
    names = [task.name for task in result]
    for task, folder in zip(result, folders, strict=True):
        if names.count(task.name) > 1:
            raise TaskFolderError(f"{folder / 'task.json'}: name {task.name!r} is used twice")
        data(folder)
    return result


def data(folder: str | os.PathLike) -> TaskData:
    """Texts and labels as the files say, every text once."""
    folder = Path(folder)
    names = _meta(folder)["class_names"]
    read = {split: user_rows.read(folder, split, names) for split in SPLITS}
    first: dict[str, str] = {}
    for rows in read.values():
        if rows.pairs != read["train"].pairs:
            kinds = ["pairs" if x.pairs else "single texts" for x in (rows, read["train"])]
            raise TaskFolderError(
                f"{rows.path}: got {kinds[0]}, but {read['train'].path.name} has {kinds[1]}"
            )
        for number, text in zip(rows.lines, rows.texts[0], strict=True):
            parts = parted(text) or (text,)
            key = "|".join(normalise(part) or part for part in parts)
            if key in first:
                raise TaskFolderError(
                    f"{rows.path} line {number}: the same text as {first[key]} (case, digits and"
                    " punctuation aside); keep one of them"
                )
            first[key] = f"{rows.path.name} line {number}"
    return TaskData(**{split: rows.texts for split, rows in read.items()})


def _task(folder: Path) -> Task:
    meta = _meta(folder)
    names = tuple(meta["class_names"])
    descriptions = tuple(meta["class_descriptions"])
    other = meta.get("paraphrases", [()] * len(names))
    name = slug(meta.get("name", folder.resolve().name))
    if not name:
        raise TaskFolderError(f"{folder / 'task.json'}: 'name' has no letter or digit")
    return Task(
        name=name,
        corpus=name,
        level="user",
        description=meta.get("description") or describe("texts", descriptions),
        class_names=names,
        class_descriptions=descriptions,
        paraphrases=tuple(tuple(words) for words in other),
        kind="folder",
        members=tuple(((name, one),) for one in names),
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
        if not is_texts(value) or not FEWEST <= len(value) <= MOST:
            count = f"{len(value)}: " if isinstance(value, list) else ""
            raise TaskFolderError(
                f"{path}: {key!r} must be {FEWEST} to {MOST} non-empty texts, got {count}{value!r}"
            )
        alike = [one.strip().casefold() for one in value]
        for one, same in zip(value, alike, strict=True):
            if alike.count(same) > 1:
                raise TaskFolderError(f"{path}: {key!r} are the same for several classes: {one!r}")
    names, count = meta["class_names"], len(meta["class_descriptions"])
    if count != len(names):
        raise TaskFolderError(
            f"{path}: got {count} 'class_descriptions', expected {len(names)}, one per class name"
        )
    for key in ("name", "description"):
        if key in meta and not is_texts([meta[key]]):
            raise TaskFolderError(f"{path}: {key!r} must be a non-empty text, got {meta[key]!r}")
    other = meta.get("paraphrases", [()] * len(names))
    lists = isinstance(other, list | tuple) and all(map(is_texts, other))
    if not lists or len(other) != len(names):
        raise TaskFolderError(
            f"{path}: 'paraphrases' must be {len(names)} lists of texts, got {other!r}"
        )
    return meta
