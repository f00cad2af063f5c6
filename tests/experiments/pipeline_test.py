"""The protocol of stages, on stages that count how often their pieces are made."""

import json

import pytest

from experiments import pipeline
from experiments.config import Config
from experiments.pipeline import Context, Piece, Stage
from experiments.processes import Processes
from experiments.workdir import StageError, write_json


def counting(name="zoo", inputs=(), made=None, count=4, fail=None):
    """A stage whose piece k writes k**2; `made` lists the pieces that were made."""
    made = [] if made is None else made

    def pieces(context, prepared):
        def make(k, folder, bar):
            if k == fail:
                raise FloatingPointError(f"piece {k}")
            made.append(k)
            write_json(folder / f"{k}.json", [k**2 + prepared])
            bar.step(k + 1)

        return [
            Piece(f"{k}.json", k + 1, lambda folder, bar, k=k: make(k, folder, bar))
            for k in range(count)
        ]

    def read(context, prepared, done):
        values = [json.loads((done.path / f"{k}.json").read_text())[0] for k in range(count)]
        assert done.info == {"pieces": count}
        return sum(values) + sum(context.products[i] for i in inputs)

    return Stage(
        name, inputs, "piece", read, lambda product: f"sum {product}",
        prepare=lambda context: 10, pieces=pieces,
        finish=lambda context, prepared, folder: {"pieces": count},
    )  # fmt: skip


def test_a_stage_is_made_once_and_read_back_the_same(tmp_path):
    made = []
    stage, context = counting(made=made), Context(Config(), tmp_path)
    assert stage.run(context) == 0 + 1 + 4 + 9 + 40
    assert sorted(made) == [0, 1, 2, 3]
    assert stage.run(context) == 54 and len(made) == 4
    assert stage.folder(context).path.name == f"zoo-{Config().key('zoo')}"


def test_a_killed_stage_resumes_with_the_missing_pieces(tmp_path):
    made, context = [], Context(Config(), tmp_path)
    with pytest.raises(FloatingPointError, match="piece 2"):
        counting(made=made, fail=2).run(context)
    assert made == [0, 1] and not counting().folder(context).done
    assert counting(made=made).run(context) == 54
    assert made == [0, 1, 2, 3]


def test_processes_divide_the_pieces_and_the_first_commits(tmp_path, monkeypatch):
    """Two processes one after the other; a barrier that does not wait stands for the real one."""
    barriers = []
    monkeypatch.setattr(Processes, "wait", lambda self, name: barriers.append(name))
    made = ([], [])
    second = Context(Config(), tmp_path, processes=Processes(1, 2))
    with pytest.raises(StageError, match="not finished"):  # as process 0 has not committed
        counting(made=made[1]).run(second)
    assert counting(made=made[0]).run(Context(Config(), tmp_path, processes=Processes(0, 2))) == 54
    assert sorted(made[0] + made[1]) == [0, 1, 2, 3] and made[0] and made[1]
    assert barriers[:2] == barriers[2:] and len(set(barriers)) == 2  # the same ones, each once
    assert counting(made=made[1]).run(second) == 54  # read by the other


def test_a_file_that_changed_is_found_before_anything_is_computed(tmp_path):
    context = Context(Config(), tmp_path)
    counting().run(context)
    (counting().folder(context).path / "1.json").write_text("[7]")
    prepared = []
    stage = Stage("zoo", (), "piece", lambda *a: 0, str, prepare=prepared.append)
    with pytest.raises(StageError, match=r"1\.json: damaged"):
        stage.run(context)
    assert not prepared


def test_the_loop_gives_each_stage_the_products_it_names(tmp_path, capsys):
    stages = (counting("data"), counting("zoo", ("data",)), counting("codec", ("data", "zoo")))
    context = pipeline.run(stages, ["codec", "zoo"], Context(Config(), tmp_path))
    assert dict(context.products) == {"data": 54, "zoo": 108, "codec": 216}
    lines = [line for line in capsys.readouterr().err.splitlines() if "sum" in line]
    assert [line.split("(")[0] for line in lines] == [
        "      data: sum 54 ", "       zoo: sum 108 ", "     codec: sum 216 ",
    ]  # fmt: skip
    assert set(pipeline.Times(tmp_path).all()) == {"data", "zoo", "codec"}
    with pytest.raises(StageError, match=r"'zoo': got no product of \['data'\], expected all"):
        stages[1].run(Context(Config(), tmp_path))
    again = pipeline.load(stages, Context(Config(), tmp_path))
    assert again.products == context.products


def test_a_stage_that_is_not_asked_for_must_be_finished(tmp_path):
    stages = (counting("data"), counting("zoo", ("data",)), counting("codec", ("zoo",)))
    with pytest.raises(StageError, match="stage 'zoo' is needed and not finished; add it to"):
        pipeline.run(stages, ["codec"], Context(Config(), tmp_path))
    with pytest.raises(StageError, match="'data' is not finished; run it first"):
        pipeline.load(stages, Context(Config(seed=1, data_seed=1), tmp_path))
    pipeline.run(stages, ["zoo"], Context(Config(), tmp_path))
    assert pipeline.run(stages, ["codec"], Context(Config(), tmp_path)).products["codec"] == 162


def test_a_stage_without_a_folder_runs_in_process_0_alone(tmp_path):
    page = Stage("report", (), "page", lambda c, p, done: done.path, str, kept=False)
    assert page.run(Context(Config(), tmp_path)) == tmp_path
    assert page.run(Context(Config(), tmp_path, processes=Processes(1, 2))) is None
    assert not list(tmp_path.iterdir())
