"""The summary by hand: rate and rank by validation rows, figures of test rows, spreads, checks."""

import pytest

from experiments.variant_study.cells import Cell, Plan
from experiments.variant_study.methods import VARIANTS
from experiments.variant_study.report import markdown, plot, summarise

TASKS = {"minilm": ("a", "b")}
RATES = [0.1, 0.3, 0.9]


def cell(variant, rank, seed, validation, test):
    """Two tasks of equal accuracies per rate."""
    twice = lambda xs: [[x, x] for x in xs]  # noqa: E731
    return Cell("minilm", variant, rank, seed, 10 * rank, RATES, twice(validation), twice(test),
                twice([0.5] * 3))  # fmt: skip


CELLS = [
    cell("LoRA", 2, 0, (0.5, 0.7, 0.6), (0.6, 0.80, 0.9)),  # validation chooses 0.3, not 0.9
    cell("LoRA", 2, 1, (0.5, 0.7, 0.6), (0.6, 0.82, 0.9)),
    cell("LoRA", 4, 0, (0.5, 0.6, 0.6), (0.5, 0.75, 0.5)),
    cell("LoRA", 4, 1, (0.5, 0.6, 0.6), (0.5, 0.75, 0.5)),
    cell("DoRA", 2, 0, (0.1, 0.2, 0.8), (0.2, 0.30, 0.815)),
    cell("DoRA", 2, 1, (0.1, 0.2, 0.8), (0.2, 0.30, 0.815)),
    cell("DoRA", 4, 0, (0.1, 0.2, 0.7), (0.2, 0.30, 0.70)),
    cell("DoRA", 4, 1, (0.1, 0.2, 0.7), (0.2, 0.30, 0.70)),
]


def test_the_row_of_a_variant():
    found = summarise(CELLS, TASKS)["bases"]["minilm"]
    row = found["variants"]["LoRA"]
    assert (row["rank"], row["rate"], row["rate at an end of the grid"]) == (2, 0.3, False)
    assert row["best"] == pytest.approx(0.81) and row["trained numbers"] == 20
    assert row["spread over rates"] == pytest.approx(0.9 - 0.6)
    assert row["spread over ranks"] == pytest.approx(0.81 - 0.75)
    assert row["deviation over seeds"] == pytest.approx(0.02 / 2**0.5)
    assert row["minus LoRA"]["mean"] == 0
    dora = found["variants"]["DoRA"]
    assert dora["rate at an end of the grid"] and dora["rank"] == 2
    assert dora["minus LoRA"]["mean"] == pytest.approx(0.005)


def test_both_checks_and_what_would_break_them():
    rates, lora = summarise(CELLS, TASKS)["checks"]
    assert rates["verdict"] == "holds" and rates["figures"] == pytest.approx(
        {"over rates": (0.3 + 0.615) / 2, "over variants": 0.005}
    )
    # DoRA is the best on validation rows, by 0.005 on test rows, on both tasks
    assert lora["verdict"] == "holds" and lora["interval"]["high"] == pytest.approx(0.005)
    better = [c._replace(test=[[0.99, 0.99]] * 3) if c.variant == "DoRA" else c for c in CELLS]
    rates, lora = summarise(better, TASKS)["checks"]
    assert lora["verdict"] == rates["verdict"] == "does not hold"
    mixed = [c._replace(test=[[x, x + 0.1] for x, _ in c.test]) if c.variant == "DoRA" else c
             for c in CELLS]  # fmt: skip
    assert summarise(mixed, TASKS)["checks"][1]["verdict"] == "undecided"


def test_the_tasks_of_all_bases_together():
    other = [c._replace(base="base_l", test=[[0.5, 0.5]] * 3) for c in CELLS]
    found = summarise([*CELLS, *other], TASKS | {"base_l": ("c", "d")})
    alone = summarise(CELLS, TASKS)
    assert found["bases"]["minilm"] == alone["bases"]["minilm"]
    assert found["bases"]["base_l"]["checks"][0]["verdict"] == "undecided", "no spread at all"
    rates = found["checks"][0]
    assert rates["interval"]["n"] == 4
    half = alone["checks"][0]["interval"]["mean"] / 2
    assert rates["interval"]["mean"] == pytest.approx(half)


def test_text_and_plot(tmp_path):
    found = summarise(CELLS, TASKS)
    lines = markdown(found | {"command": "run it"}).splitlines()
    rows = [line for line in lines if line.startswith(("| DoRA", "| LoRA"))]
    assert rows[0].startswith("| DoRA | rank | 20 | 81.5 (rate at an end of its grid) | +0.5")
    assert rows[1].startswith("| LoRA | rank | 20 | 81.0 | +0.0")
    assert any(line.startswith("- holds: tuned LoRA is within 1 point") for line in lines)
    variants = found["bases"]["minilm"]["variants"]
    plot(variants, tmp_path / "a.svg")
    plot(variants, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "DoRA" in text


def test_tags_come_from_the_rooms_of_the_records():
    tags = {name: VARIANTS[name].tags for name in
            ("LoRA", "LoRA+", "PiSSA", "VeRA", "EVA", "DyLoRA", "Experts")}  # fmt: skip
    assert tags == {"LoRA": ("rank",), "LoRA+": ("optimisation",), "PiSSA": ("initialisation",),
                    "VeRA": ("rank",), "EVA": ("initialisation",), "DyLoRA": ("rank",),
                    "Experts": ("mixture of experts",)}  # fmt: skip
    assert all(v.tags for v in VARIANTS.values())
    with pytest.raises(ValueError, match="systems: got 'nothing', expected a record's name"):
        VARIANTS["LoRA"]._replace(systems=("nothing",)).tags  # noqa: B018


@pytest.mark.parametrize(("change", "message"), [
    ({"variants": ("Lora",)}, "--variants: got 'Lora', expected some of"),
    ({"seeds": (0, 0)}, "--seeds: got .0, 0., expected different values"),
    ({"ranks": (0,)}, "--ranks: got 0, expected > 0"),
    ({"factors": ()}, "--factors: got .., expected different values"),
    ({"factors": (1.0,)}, "--factors: got .1.0., expected 2 or more"),
    ({"bases": ("bert",)}, "--bases: got 'bert', expected some of .'base_c', 'base_l', 'minilm'."),
    ({"steps": 0}, "--steps: got 0, expected at least 1"),
])  # fmt: skip
def test_plans_that_are_refused(change, message):
    plan = Plan(("minilm",), ("LoRA",), (2,), (0,), (1.0, 3.0), 1, 1)
    plan.check()
    with pytest.raises(ValueError, match=message):
        plan._replace(**change).check()
