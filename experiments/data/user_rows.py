"""The labelled texts of a user's task: one split from its JSON lines or its CSV file.

A row is a text, for a task of pairs a second text, and a label: the class's name or its number::

    {"text": "...", "label": "a"}                          train.jsonl
    {"text": "...", "text_b": "...", "label": 0}           the same of a task of pairs

    text,text_b,label                                      train.csv, a header and quoted fields
    "...","...",a

A byte order mark and blank lines are nothing. Raises `TaskFolderError` with file and line.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.task import SEPARATOR, SPLITS, Texts, joined

COLUMNS = ("text", "text_b", "label")


class TaskFolderError(ValueError):
    """A task folder is not as it must be; the message says where and what to do."""


class Split(NamedTuple):
    """One split as its file says."""

    path: Path  # of the file
    texts: Texts  # a pair is one text
    lines: list[int]  # number of the line of each text
    pairs: bool  # whether its rows are pairs


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts that are not empty."""
    return isinstance(value, list | tuple) and all(isinstance(x, str) and x.strip() for x in value)


def read(folder: Path, split: str, names: Sequence[str]) -> Split:
    """A split of a task folder.

    Args:
      folder: the task's. split: one of `SPLITS`. names: of the classes, in their order.
    """
    path = folder / f"{split}.jsonl"
    table = folder / f"{split}.csv"
    if path.exists() and table.exists():
        raise TaskFolderError(f"{table}: {path.name} is there too; keep one of them")
    path = table if table.exists() else path
    texts: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    shape = None  # (whether rows are pairs, line that says so)
    for number, row in _csv(path) if path == table else _jsonl(path):
        where = f"{path} line {number}"
        pair = "text_b" in row
        shape = shape or (pair, number)
        if pair != shape[0]:
            got = "a 'text_b'" if pair else "no 'text_b'"
            raise TaskFolderError(
                f"{where}: got {got}, unlike line {shape[1]}; a task has pairs or single texts"
            )
        columns = [_text(row, key, where) for key in COLUMNS[: 1 + pair]]
        texts.append(joined(*columns) if pair else columns[0])
        labels.append(_label(row["label"], names, path == table, where))
        lines.append(number)
    for index, name in enumerate(names):
        if index not in labels:
            raise TaskFolderError(f"{path}: no text of class {name!r}; give at least one")
    return Split(path, (texts, np.asarray(labels, np.int32)), lines, bool(shape and shape[0]))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not is_texts([value]):
        raise TaskFolderError(f"{where}: {key!r} must be a non-empty text, got {value!r}")
    if SEPARATOR in value:
        raise TaskFolderError(f"{where}: {key!r} holds {SEPARATOR}, which parts a pair; remove it")
    return value.strip()


def _label(label: Any, names: Sequence[str], written: bool, where: str) -> int:
    """The number of a class; in a CSV file numbers are written as texts."""
    if isinstance(label, str) and label in names:
        return names.index(label)
    if written and isinstance(label, str) and label.isdecimal():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    known = "0 and 1" if len(names) == 2 else f"0 to {len(names) - 1}"
    raise TaskFolderError(f"{where}: unknown label {label!r}; known: {list(names)} or {known}")


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise TaskFolderError(f"{path} is missing; a task needs {', '.join(SPLITS)}") from None
    except UnicodeDecodeError as error:
        raise TaskFolderError(f"{path} is not UTF-8: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_content(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskFolderError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not {"text", "label"} <= set(row):
            raise TaskFolderError(f"{where}: expected an object with 'text' and 'label'")
        yield number, row


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(_content(path), newline=""), strict=True)
    try:
        head = [name.strip() for name in next(rows, [])]
        if not {"text", "label"} <= set(head) or len(set(head)) < len(head):
            raise TaskFolderError(
                f"{path} line 1: got columns {head}, expected text, label and for pairs text_b"
            )
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(head):
                raise TaskFolderError(
                    f"{path} line {rows.line_num}: got {len(row)} fields, expected {len(head)}"
                )
            yield rows.line_num, dict(zip(head, row, strict=True))
    except csv.Error as error:
        raise TaskFolderError(f"{path} line {rows.line_num} is not CSV: {error}") from error
