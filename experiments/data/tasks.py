"""Tasks and their texts: ``build(config) -> [Task]``, ``data(task) -> TaskData``.

A text's split depends on the text alone (``task.split_of`` of its corpus' unit), so it is the same
in every task; classes are cut to equal size in an order that depends on the texts alone.
"""

import functools
import os

from experiments.data import corpora, forms, glue, user
from experiments.data.descriptions.forms import FORMS
from experiments.data.plan import build, seen_pairs_pool
from experiments.data.presets import PRESETS, PairPlan, TaskConfig, config
from experiments.data.task import (
    LEVELS,
    SPLITS,
    Caps,
    Member,
    Task,
    TaskData,
    Texts,
    balanced,
    shuffled,
    split_of,
)

__all__ = [
    "LEVELS",
    "PRESETS",
    "SPLITS",
    "Caps",
    "PairPlan",
    "Task",
    "TaskConfig",
    "TaskData",
    "build",
    "config",
    "data",
    "label_texts",
    "seen_pairs_pool",
]


def data(task: Task, cache: str | os.PathLike | None = None, caps: Caps | None = None) -> TaskData:
    """The texts of a task; downloads what is needed into ``cache`` (default JLORA_CACHE).

    Corpus and GLUE tasks have classes of equal size, at most ``caps`` per class; a user's task is
    returned as its files say. Raises ``ValueError`` for a class without texts in a split.
    """
    caps = caps or Caps()
    kind, _, where = task.source.partition(":")
    if kind == "folder":
        return user.data(where)
    if kind == "glue":
        return glue.data(task, where, caps)
    if kind not in ("corpora", "forms"):
        raise ValueError(f"task {task.name}: unknown source {task.source!r}")
    return TaskData(
        train=_split(task, "train", caps.train, cache),
        validation=_split(task, "validation", caps.validation, cache),
        test=_split(task, "test", caps.test, cache),
    )


def label_texts(
    corpus: str, label: str, split: str, cache: str | os.PathLike | None = None
) -> list[str]:
    """All texts of one label in one split, in the order from which tasks take the first ones."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {SPLITS}")
    parts = _parts(corpus, None if cache is None else os.fspath(cache))
    if label not in parts[split]:
        raise ValueError(f"corpus {corpus!r} has no label {label!r}: {sorted(parts[split])}")
    return list(parts[split][label])


def _split(task: Task, split: str, cap: int, cache: str | os.PathLike | None) -> Texts:
    key = None if cache is None else os.fspath(cache)
    if task.source == "forms":
        sides = _formed(task, split, cap, key)
    else:
        sides = [_mixed(side, split, cap, key) for side in task.members]
    for name, texts in zip(task.class_names, sides, strict=True):
        if not texts:
            raise ValueError(f"task {task.name}: no {split} text of class {name!r}")
    return balanced(sides, cap)


def _formed(task: Task, split: str, cap: int, cache: str | None) -> list[list[str]]:
    """Texts of each class of a task of form, in the order of its classes."""
    sources = [label_texts(*member, split, cache) for member in task.members[0]]
    names = [label.name for label in FORMS[task.kind]]
    formed = forms.sides(task.kind, sources, cap) or [[] for _ in names]
    sides = dict(zip(names, formed, strict=True))
    return [sides[name] for name in task.class_names]


def _mixed(side: tuple[Member, ...], split: str, cap: int, cache: str | None) -> list[str]:
    """Texts of several labels in turn: each label gives as many as any other, as far as it goes."""
    parts = [label_texts(*member, split, cache)[:cap] for member in side]
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


@functools.cache
def _parts(corpus: str, cache: str | None) -> dict[str, dict[str, list[str]]]:
    """split -> label -> texts."""
    loaded = corpora.load(corpus, cache)
    parts = {split: {label: [] for label in loaded.label_names} for split in SPLITS}
    for text, index, unit in zip(loaded.texts, loaded.labels, loaded.units, strict=True):
        parts[split_of(unit)][loaded.label_names[index]].append(text)
    return {
        split: {label: shuffled(texts) for label, texts in labels.items()}
        for split, labels in parts.items()
    }
