"""GLUE as tasks, through ``datasets``: from the hub, or from a local copy.

``tasks(path)`` with an empty path asks the hub for ``nyu-mll/glue``; a path is a folder with one
folder per task, each what ``Dataset.save_to_disk`` wrote or what ``load_dataset`` understands (for
instance ``train.jsonl`` and ``validation.jsonl`` or parquet files). GLUE's test labels are secret,
so its validation split is our test split and a part of train, chosen by hash of the text, our
validation split; a train text that is also in the test split is dropped. Sentence pairs become one
text around ``[SEP]``. MNLI gives its three label pairs; STS-B is a regression and is not offered.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

from experiments.data.assets import AssetError
from experiments.data.corpora import normalise, opening
from experiments.data.descriptions import Label
from experiments.data.task import (
    Caps,
    Task,
    TaskData,
    balanced,
    describe,
    joined,
    shuffled,
    split_of,
)


class GlueError(AssetError):
    """GLUE cannot be had; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class _Set:
    fields: tuple[str, ...]  # one sentence, or the two of a pair
    labels: tuple[Label, ...]  # in GLUE's order
    domain: str
    test: str = "validation"


def _label(name: str, description: str, one: str, second: str) -> Label:
    return Label(name, description, (one, second))


_SAME = _label(
    "paraphrase",
    "Both texts mean the same.",
    "The second says the first in other words.",
    "The two agree in meaning.",
)
_DIFFERENT = _label(
    "no paraphrase",
    "The two texts mean different things.",
    "The second is not another wording of the first.",
    "They differ in meaning.",
)
_FOLLOWS = _label(
    "entailment",
    "The second sentence follows from the first.",
    "If the first is true so is the second.",
    "The first implies the second.",
)
_NOT_FOLLOWS = _label(
    "no entailment",
    "The second sentence does not follow from the first.",
    "The first may be true and the second false.",
    "The first does not imply the second.",
)

SETS: dict[str, _Set] = {
    "cola": _Set(
        ("sentence",),
        (
            _label(
                "ungrammatical",
                "A sentence that no speaker of English would accept.",
                "The grammar is wrong.",
                "The words do not form a proper sentence.",
            ),
            _label(
                "grammatical",
                "A sentence that is good English grammar.",
                "A speaker would accept it.",
                "The words form a proper sentence.",
            ),
        ),
        "example sentences of linguists",
    ),
    "sst2": _Set(
        ("sentence",),
        (
            _label(
                "negative",
                "A phrase of a film review with a bad opinion.",
                "The critic dislikes it.",
                "Words of blame for a movie.",
            ),
            _label(
                "positive",
                "A phrase of a film review with a good opinion.",
                "The critic likes it.",
                "Words of praise for a movie.",
            ),
        ),
        "film review phrases",
    ),
    "mrpc": _Set(("sentence1", "sentence2"), (_DIFFERENT, _SAME), "pairs of news sentences"),
    "qqp": _Set(("question1", "question2"), (_DIFFERENT, _SAME), "pairs of questions"),
    "mnli": _Set(
        ("premise", "hypothesis"),
        (
            _FOLLOWS,
            _label(
                "neutral",
                "The second sentence may be true or false given the first.",
                "The first does not settle the second.",
                "Neither implied nor excluded.",
            ),
            _label(
                "contradiction",
                "The second sentence contradicts the first.",
                "Both cannot be true.",
                "The first excludes the second.",
            ),
        ),
        "pairs of sentences",
        test="validation_matched",
    ),
    "qnli": _Set(
        ("question", "sentence"),
        (
            _label(
                "answers",
                "The sentence holds the answer to the question.",
                "One can answer from it.",
                "What was asked is told.",
            ),
            _label(
                "does not answer",
                "The sentence does not hold the answer to the question.",
                "One cannot answer from it.",
                "What was asked is not told.",
            ),
        ),
        "questions with a sentence",
    ),
    "rte": _Set(("sentence1", "sentence2"), (_FOLLOWS, _NOT_FOLLOWS), "pairs of news sentences"),
    "wnli": _Set(("sentence1", "sentence2"), (_NOT_FOLLOWS, _FOLLOWS), "pairs of sentences"),
}


def tasks(
    path: str = "", names: tuple[str, ...] | None = None, held_out: tuple[str, ...] = ()
) -> list[Task]:
    """One task a set (MNLI: three); ``held_out`` sets get level "unseen_corpus".

    ``names`` defaults to all sets, or with a ``path`` to the sets that have a folder there.
    """
    if path and not Path(path).is_dir():
        raise GlueError(f"the local GLUE folder {path} is not a folder")
    if names is None:
        names = tuple(name for name in SETS if not path or (Path(path) / name).is_dir())
    if not names:
        raise GlueError(f"{path} holds no GLUE task; expected folders named {', '.join(SETS)}")
    for name in (*names, *held_out):
        if name not in SETS:
            raise GlueError(f"unknown GLUE task {name!r}; offered: {', '.join(SETS)}")
    result = []
    for name in names:
        level = "unseen_corpus" if name in held_out else "seen"
        for i, j in itertools.combinations(range(len(SETS[name].labels)), 2):
            result.append(_task(name, i, j, path, level))
    return result


def _task(name: str, i: int, j: int, path: str, level: str) -> Task:
    a, b = SETS[name].labels[i], SETS[name].labels[j]
    descriptions = (a.description, b.description)
    return Task(
        name=f"glue-{name}" if len(SETS[name].labels) == 2 else f"glue-{name}--{i}--{j}",
        corpus=f"glue-{name}",
        level=level,
        description=describe(SETS[name].domain, descriptions),
        class_names=(a.name, b.name),
        class_descriptions=descriptions,
        paraphrases=(a.paraphrases, b.paraphrases),
        kind="glue",
        members=(((f"glue-{name}", str(i)),), ((f"glue-{name}", str(j)),)),
        source=f"glue:{path}",
    )


def data(task: Task, path: str, caps: Caps) -> TaskData:
    """Texts of a GLUE task, classes of equal size."""
    name = task.corpus.removeprefix("glue-")
    zero, one = (int(side[0][1]) for side in task.members)
    rows = _rows(name, path)
    parts = {
        split: balanced(
            [shuffled(labels.get(side, [])) for side in (zero, one)], getattr(caps, split)
        )
        for split, labels in rows.items()
    }
    for split, (texts, _) in parts.items():
        if not texts:
            raise GlueError(f"{task.name}: a class has no {split} text in {path or 'the hub'}")
    return TaskData(**parts)


@functools.cache
def _rows(name: str, path: str) -> dict[str, dict[int, list[str]]]:
    """split -> label -> texts, no normalised text twice."""
    loaded = _load(name, path)
    want = SETS[name]
    out: dict[str, dict[int, list[str]]] = {"train": {}, "validation": {}, "test": {}}
    seen: set[str] = set()
    for origin in (want.test, "train"):  # test first: what it holds is dropped from train
        if origin not in loaded:
            raise GlueError(f"glue {name}: no split {origin!r} in {path or 'the hub'}")
        table = loaded[origin]
        for column in (*want.fields, "label"):
            if column not in table.column_names:
                raise GlueError(f"glue {name}: no column {column!r}, got {table.column_names}")
        for row in table:
            parts = [" ".join(str(row[field]).split()) for field in want.fields]
            text = joined(*parts) if len(parts) == 2 else parts[0]
            label = int(row["label"])
            key = normalise(text)
            if key in seen or not 0 <= label < len(want.labels):
                continue
            seen.add(key)
            split = "test" if origin == want.test else split_of(opening(key))
            # Two of three hash parts stay train: GLUE brings its own test split.
            out["train" if origin == "train" and split == "test" else split].setdefault(
                label, []
            ).append(text)
    return out


def _load(name: str, path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise GlueError("--tasks=glue needs 'datasets': pip install 'jlora[glue]'") from error
    try:
        if not path:
            return datasets.load_dataset("nyu-mll/glue", name)
        folder = Path(path) / name
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))
    except Exception as error:  # datasets raises many kinds; each means "not to be had"
        where = f"the folder {Path(path) / name}" if path else "the hub (offline?)"
        raise GlueError(
            f"glue {name} cannot be loaded from {where}: {error}. Give a local copy: a folder with "
            f"{name}/ as saved by datasets' save_to_disk"
        ) from error
