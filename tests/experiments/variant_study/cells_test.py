"""Finished cells are read back; only missing ones are measured."""

import types
from typing import Any

import pytest

from experiments.variant_study import cells
from experiments.variant_study.cells import Cell, Plan

PLAN = Plan(("minilm",), ("LoRA", "VeRA"), (2,), (0, 1), (1.0, 3.0), 4, 4)


@pytest.fixture
def study(tmp_path):
    """(run, what was measured): a sweep whose cells cost nothing."""
    made = []

    def make(bench, variant, rank, seed, plan):
        made.append((variant.name, rank, seed))
        return Cell(bench.name, variant.name, rank, seed, 7, [0.1], [[0.5]], [[0.25 + seed]],
                    [[1.0]])  # fmt: skip

    bench: Any = types.SimpleNamespace(name="minilm", key="0123")
    return (lambda plan=PLAN: cells.sweep(bench, plan, tmp_path, make)), made, tmp_path


def test_only_missing_cells_are_measured(study):
    run, made, folder = study
    first = run()
    assert made == [("LoRA", 2, 0), ("LoRA", 2, 1), ("VeRA", 2, 0), ("VeRA", 2, 1)]
    next(folder.glob("cells-*/LoRA-2-1.json")).unlink()
    assert run() == first and made[4:] == [("LoRA", 2, 1)]
    run(PLAN._replace(steps=5))  # other settings are other cells
    assert len(made) == 9


def test_a_damaged_cell_is_refused(study):
    run, _, folder = study
    run()
    file = next(folder.glob("cells-*/VeRA-2-0.json"))
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"VeRA-2-0\.json: got .., expected"):
        run()
