"""A user's result: n counts texts, with interval, chance and what was not read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.config import Config
from experiments.stages import (
    base_model,
    conditions,
    cross_validation,
    user_tasks,
    world,
    zoo_training,
)

EXAMPLE = Path(__file__).parent / "fixtures" / "user_task" / "birds_or_mushrooms"
CONFIG = Config(
    base="tiny", tasks="toy", layers=1, max_length=8, train_texts=4, eval_rows=10, examples=2,
    zoo_steps=3, zoo_segment=3, zoo_batch=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The example task with all but two of its test texts of class 0."""
    folder = tmp_path_factory.mktemp("tasks") / EXAMPLE.name
    shutil.copytree(EXAMPLE, folder)
    rows = [json.loads(x) for x in (folder / "test.jsonl").read_text().splitlines()]
    zero = [r for r in rows if r["label"] == "birds"]
    one = [r for r in rows if r["label"] == "mushrooms"][:2]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, zero + one)))
    base = world.build(CONFIG, tmp_path_factory.mktemp("world"), None)
    config = Config(**vars(CONFIG) | {"task_dir": str(folder.parent)})
    return user_tasks.extend(base, config, None)


def test_texts_are_counted_and_what_is_cut_is_said(mine):
    base = base_model.load(mine.config, None)
    data = user_tasks.describe(mine, base, mine.tasks[0], 2)
    assert data.test_texts == 10 and data.train_texts == 16
    assert data.test_texts_per_class == {"birds": 8, "mushrooms": 2}
    assert data.chance == 0.8  # of always saying birds
    every = [
        json.loads(line)["text"]
        for path in EXAMPLE.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    long = sum(len(text.split()) > CONFIG.max_length for text in every)
    assert 0 < data.longer_texts <= long  # six test texts were taken out
    shown = " ".join(data.sentences())
    assert "10 test texts (8 birds, 2 mushrooms): chance is 80.0 %" in shown
    assert f"{data.longer_texts} texts have more than max_length=8 tokens" in shown


def test_a_cell_counts_texts_and_adapters_apart():
    hits = np.asarray([[True] * 7 + [False] * 9, [True] * 8 + [False] * 8])
    cell = user_tasks.cell(hits)
    assert cell["n"] == 16 and cell["adapters"] == 2
    assert cell["mean"] == 15 / 32 and cell["low"] < 0.3 and cell["high"] > 0.6
    np.testing.assert_allclose(cell["std"], np.std([7 / 16, 0.5], ddof=1))


def test_the_terminal_says_when_a_figure_is_not_above_chance(mine):
    data = user_tasks.describe(mine, base_model.load(mine.config, None), mine.tasks[0], 2)
    rng = np.random.default_rng(0)
    cells = {key: user_tasks.cell(rng.random((1, 10)) < 0.5) for key in user_tasks.ORDER}
    cells["trained"] = user_tasks.cell(np.ones((1, 200), bool))
    cells["logreg"] = user_tasks.cell(np.ones((1, 200), bool), 0)
    right = {"generated": np.zeros(4), "logreg": np.ones(4), "ridge": np.zeros(4)}
    found = cross_validation.verdict(right)
    shown = user_tasks.lines("birds", user_tasks.Scores(data, cells, found))
    assert shown[0].startswith("birds: the generated adapter is NOT the best here: use logistic")
    rows = {line.split()[0]: line for line in shown if line.startswith("  ")}
    assert set(user_tasks.ORDER) <= set(rows)  # each rival has its row
    assert rows["trained"].endswith("above chance")
    assert rows["generated"].endswith(("not distinguishable from chance", "below chance"))
    assert rows["logreg"].split()[-3:] == ["–", "100.0", "%"]  # no adapter; cross-validated
    assert rows["multitask"].split()[-2:] == ["1", "–"]
    alone = user_tasks.lines("birds", user_tasks.Scores(data, cells, None))
    assert "nothing is recommended" in alone[0] and alone[1:-1] != shown[1:-1]


def test_an_adapter_is_trained_on_the_users_own_texts(mine, tmp_path):
    trained = user_tasks.train(mine, tmp_path)
    fresh = zoo_training.template(mine, CONFIG.seed).trainable
    for path, leaves in trained.items():
        assert leaves["b"].shape == (1, *fresh[path]["b"].shape)
        assert np.abs(leaves["b"][0] - fresh[path]["b"]).max() > 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["tensorboard"]  # nothing half done is left


def test_all_training_texts_may_be_examples(mine):
    """`train_texts=4` cuts what is taken of the corpora, never what a user gave."""
    table = conditions.table(mine, [mine.tasks[0].name])
    assert table.counts.tolist() == [[8, 8]]
    members = np.asarray(table.members[0])
    rows = mine.rows[mine.tasks[0].name, "train"]
    for side in (0, 1):
        assert set(members[side]) == set(rows.index[rows.label == side])
