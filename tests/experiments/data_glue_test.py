"""GLUE through ``datasets`` from local folders: the same Task and TaskData as everything else."""

import json
import sys

import numpy as np
import pytest

from experiments.data import glue, tasks

WORDS = "red green blue dark light warm cold tall small round flat soft".split()


def sentence(i: int) -> str:
    return f"the {WORDS[i % 12]} and {WORDS[(i // 12) % 12]} thing number {'x' * (i // 144 + 1)} is"


def sst2(n: int, start: int = 0) -> dict[str, list]:
    rows = [(sentence(start + i) + (" good" if i % 2 else " bad"), i % 2) for i in range(n)]
    return {"sentence": [r[0] for r in rows], "label": [r[1] for r in rows], "idx": list(range(n))}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """sst2 as save_to_disk writes it, mrpc as plain jsonl files."""
    import datasets

    root = tmp_path_factory.mktemp("glue")
    train, validation = sst2(120), sst2(30, start=200)
    # A test sentence that is in train too, and a hidden label as in GLUE's test split.
    train["sentence"][7] = validation["sentence"][1].upper()
    parts = {"train": train, "validation": validation, "test": dict(sst2(6), label=[-1] * 6)}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(part) for name, part in parts.items()}
    ).save_to_disk(str(root / "sst2"))
    (root / "mrpc").mkdir()
    for name, count, start in (("train", 80, 0), ("validation", 20, 80)):
        lines = [
            {"sentence1": sentence(i), "sentence2": sentence(i * 7 + 3), "label": i % 2, "idx": i}
            for i in range(start, start + count)
        ]
        (root / "mrpc" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_same_code_path(local, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    found = glue.tasks(str(local))
    assert [t.name for t in found] == ["glue-sst2", "glue-mrpc"]
    for task in found:
        assert task.kind == "glue" and task.level == "seen"
        assert all(d in task.description for d in task.class_descriptions)
        assert all(len(p) >= 2 for p in task.paraphrases)
        got = tasks.data(task, caps=tasks.Caps(train=30, validation=5, test=10))
        splits = (got.train, got.validation, got.test)
        for texts, labels in splits:
            assert labels.dtype == np.int32 and labels.sum() * 2 == len(labels) == len(texts) > 0
        keys = [glue.normalise(t) for texts, _ in splits for t in texts]
        assert len(set(keys)) == len(keys)
        assert len(got.train[0]) == 60 and len(got.test[0]) == 20
    whole = tasks.data(found[0], caps=tasks.Caps(10**6, 10**6, 10**6))
    assert len(whole.test[0]) == 30
    twin = glue.normalise(sst2(30, start=200)["sentence"][1])
    assert twin in map(glue.normalise, whole.test[0])
    assert twin not in map(glue.normalise, whole.train[0] + whole.validation[0])
    assert all(("good" in t) == bool(y) for t, y in zip(*whole.train, strict=True))
    pair = tasks.data(found[1]).test[0][0]
    assert pair.count(" [SEP] ") == 1


def test_names_and_levels():
    found = glue.tasks("", ("mnli", "cola"), held_out=("cola",))
    assert [t.name for t in found] == [
        *("glue-mnli--0--1", "glue-mnli--0--2", "glue-mnli--1--2", "glue-cola"),
    ]
    assert [t.level for t in found] == ["seen"] * 3 + ["unseen_corpus"]
    assert found[1].class_names == ("entailment", "contradiction")


def test_errors(tmp_path, local, monkeypatch):
    with pytest.raises(glue.GlueError, match="unknown GLUE task 'stsb'; offered: cola"):
        glue.tasks("", ("stsb",))
    with pytest.raises(glue.GlueError, match="is not a folder"):
        glue.tasks(str(tmp_path / "nowhere"))
    with pytest.raises(glue.GlueError, match="holds no GLUE task; expected folders named cola"):
        glue.tasks(str(tmp_path))
    (tmp_path / "rte").mkdir()
    (task,) = glue.tasks(str(tmp_path))
    with pytest.raises(glue.GlueError, match="glue rte cannot be loaded from the folder"):
        tasks.data(task)
    wrong = dict(glue.SETS, mrpc=glue.SETS["rte"], sst2=glue.SETS["qqp"])
    monkeypatch.setattr(glue, "SETS", wrong)
    glue._rows.cache_clear()
    task = glue.tasks(str(local), ("sst2",))[0]
    with pytest.raises(glue.GlueError, match="no column 'question1', got"):
        tasks.data(task)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(glue.GlueError, match=r"pip install 'jlora\[glue\]'"):
        tasks.data(task)
