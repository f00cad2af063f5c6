"""Merging quality: figures from made-up counts, factors, resuming, and a whole tiny run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.merging import cells as lib
from experiments.merging import report as report
from experiments.merging import text as command

TASKS = ["a", "b", "c", "d"]


def made_up():
    """Figures of two seeds, T = 2 and 4, two methods; `ties` is better in one seed only."""
    plan = dataclasses.asdict(lib.Plan(sizes=(2, 4)))
    settings = lib.settings(lib.Plan(sizes=(2, 4)), TASKS, 2)
    draw = np.random.default_rng(0)
    single = {f"{t}/{s}/{r}": float(draw.uniform(0.7, 1.0)) for t in TASKS for s in (0, 1)
              for r in (4, 8)}  # fmt: skip
    results = {}
    for s in settings:
        for method in ("task_arithmetic", "ties"):
            cell = {k: {t: float(draw.uniform(0.4, 0.9)) for t in s.tasks}
                    for k in ("default", "tuned")}  # fmt: skip
            results.setdefault(s.name, {}).setdefault(method, {})[str(s.seed)] = cell
    for s, low in (("0", 0.5), ("1", 0.7)):
        results["4"]["ties"][s]["tuned"] = dict.fromkeys(TASKS, 0.6)
        results["4"]["task_arithmetic"][s]["tuned"] = dict.fromkeys(TASKS, low)
    return {
        "config": {"base": "x", "sites": "s", "layers": 2, "zoo_steps": 3},
        "plan": plan, "tasks": TASKS, "seeds": 2, "single": single, "results": results,
        "settings": [s._asdict() for s in settings], "base": dict.fromkeys(TASKS, 0.5),
        "multitask": dict.fromkeys(TASKS, 0.8),
    }  # fmt: skip


def test_settings_take_other_tasks_for_other_seeds_and_mix_ranks():
    rows = lib.settings(lib.Plan(sizes=(2, 4)), TASKS, 2)
    assert [r.tasks for r in rows if r.name == "2"] == [("a", "b"), ("c", "d")]
    assert [r.ranks for r in rows if r.name == "4"] == [(4, 4, 4, 4)] * 2
    assert [r.ranks for r in rows if r.name == "4 mixed"] == [(4, 8, 4, 8)] * 2
    with pytest.raises(ValueError, match="sizes"):
        lib.settings(lib.Plan(sizes=(2, 5)), TASKS, 1)


def test_factors_reach_from_the_mean_to_the_sum():
    np.testing.assert_allclose(lib.factors(8, "ties"), [1, 2, 4, 8], rtol=1e-12)
    np.testing.assert_allclose(lib.factors(8, "wudi"), [0.25, 0.5, 1, 2], rtol=1e-12)


def test_every_row_of_the_table_is_tried_or_said_to_equal_another():
    assert {*lib.METHODS, *lib.SAME} == set(jl.merging.METHODS)
    assert set(lib.SAME.values()) <= set(lib.METHODS)


def test_summary_by_numpy():
    found = made_up()
    got = report.summarise(found)
    values = []
    for s in ("0", "1"):
        ratio = [found["results"]["4"]["ties"][s]["tuned"][t] / found["single"][f"{t}/{s}/4"]
                 for t in TASKS]  # fmt: skip
        values.append(sum(ratio) / 4)
    cell = got["normalised"]["4"]["ties"]["tuned"]
    assert cell["mean"] == pytest.approx(sum(values) / 2)
    assert cell["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_verdicts_need_every_seed():
    found = made_up()
    (claim,) = report.summarise(found)["claims"]
    assert (claim["above"], claim["verdict"]) == ("ties", "undecided")
    results = found["results"]["4"]["task_arithmetic"]
    for low, verdict in ((0.5, "reproduced"), (0.7, "reversed")):
        for s in ("0", "1"):
            results[s]["tuned"] = dict.fromkeys(TASKS, low)
        assert report.summarise(found)["claims"][0]["verdict"] == verdict


def test_page_holds_the_figures_and_keeps_the_rest():
    found = made_up()
    summary = report.summarise(found)
    text = report.render(found, summary, "cmd")
    cell = summary["normalised"]["2"]["ties"]["default"]
    assert f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}" in text
    assert "| undecided |" in text and "reproduced |" not in text
    page = report.between("before\n" + report.EMPTY + "after\n", text)
    assert page.startswith("before\n") and page.endswith("after\n")
    assert report.between(page, text) == page
    with pytest.raises(ValueError, match="marks"):
        report.between("no marks", text)
    assert report.plot(found, summary).startswith("<svg")


def test_scaled_is_the_base_plus_c_times_the_delta(monkeypatch):
    params = {"k": jnp.ones((6, 5))}
    apply = lambda p, x: x @ p["k"]  # noqa: E731
    adapter = jl.init(jax.random.key(0), apply, params, jnp.ones((2, 6)),
                      methods={"k": jl.LoRA(rank=2, alpha=4.0)})  # fmt: skip
    b = jax.random.normal(jax.random.key(1), (2, 5))
    a = adapter.trainable["k"]["a"]
    adapter = adapter.replace(trainable={"k": {"a": a, "b": b}})

    def check():
        got = lib.scaled(params, adapter, jnp.float32(3.0))["k"]
        want = 1.0 + 3.0 * 2.0 * np.asarray(a) @ np.asarray(b)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    check()
    monkeypatch.setattr(lib, "scaled", lambda upper, one, c: jl.merge(upper, one))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.slow
def test_a_tiny_run_from_training_to_the_page(tmp_path, monkeypatch):
    args = ["--quick", f"--workdir={tmp_path / 'run'}", f"--docs={tmp_path / 'docs'}"]
    first = command.main(args)
    found = json.loads((tmp_path / "docs/results/merging_quality.json").read_text())
    assert set(found["results"]) == {"2", "4", "4 mixed"}
    assert "slerp" in found["results"]["2"] and "slerp" not in found["results"]["4"]
    # weights 1/T and factor T are the plain sum
    cell = found["results"]["4"]["task_arithmetic"]["0"]
    assert set(cell["validation"]) == {f"{c:.4g}" for c in lib.factors(4, "ties")}
    assert "| `tsv` |" in (tmp_path / "docs/merging_quality.md").read_text()
    # nothing is computed again
    monkeypatch.setattr(lib, "judge", lambda *a: pytest.fail("a finished cell was judged again"))
    assert command.main(args) == first
