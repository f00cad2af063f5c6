"""report.json: built figures against hand calculation, refusals by path, bitwise repeatable."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import cond_pdiff
from experiments.report import build, claims, html, markdown, schema, words
from experiments.report.example import example


@pytest.fixture(scope="module")
def report():
    return example(tasks=6)[0]


def broken(report, path, value):
    """A copy with the value at a dotted path replaced, or deleted where ``value`` is ``...``."""
    report = copy.deepcopy(report)
    *parents, last = path.split("/")
    place = report
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return report


def test_cells_summaries_and_gaps_match_hand_calculation():
    got = build.cell([0.5, 0.7, 0.9])
    assert got["n"] == 3 and got["values"] == [0.5, 0.7, 0.9]
    np.testing.assert_allclose([got["mean"], got["std"]], [0.7, 0.2])
    assert build.cell(0.5)["std"] == 0 and build.cell(0.5)["n"] == 1

    methods = {key: [0.5] for key in schema.UNSEEN_KEYS}
    tasks = {
        "a": methods | {"base": [0.5], "trained": [0.9], "generated": [0.8, 0.9], "ridge": 0.7},
        "b": methods | {"base": [0.4], "trained": [0.6], "generated": [0.5], "ridge": 0.6},
        "c": methods | {"base": [0.5], "trained": [0.52], "generated": [0.1], "ridge": 0.5},
    }
    level = build.level(tasks, "unseen_pair")
    assert level["dropped"] == ["c"]  # its gap of 2 points is noise
    np.testing.assert_allclose(level["gap_recovered"]["generated"]["mean"], 0.45 / 0.6)
    np.testing.assert_allclose(level["gap_recovered"]["ridge"]["mean"], 0.4 / 0.6)
    np.testing.assert_allclose(level["paired"]["ridge"]["mean"], (0.15 - 0.1 - 0.4) / 3)
    np.testing.assert_allclose(level["accuracy"]["generated"]["mean"], (0.85 + 0.5 + 0.1) / 3)
    np.testing.assert_allclose(
        level["accuracy"]["generated"]["within"], np.std([0.8, 0.9], ddof=1) / 3
    )


def test_a_user_task_needs_no_trained_adapter():
    level = build.level({"mine": {"base": 0.5, "generated": [0.7, 0.8]}}, "user")
    assert level["gap_recovered"] == {"generated": None} and level["paired"] == {}
    with pytest.raises(schema.ReportError, match=r"unseen_pair.table.mine: missing trained"):
        build.level({"mine": {"base": 0.5, "generated": 0.7}}, "unseen_pair")


def test_written_report_reads_back_and_is_bitwise_repeatable(report, tmp_path):
    schema.write(tmp_path / "a.json", report)
    schema.write(tmp_path / "b.json", example(tasks=6)[0])
    first = (tmp_path / "a.json").read_bytes()
    assert first == (tmp_path / "b.json").read_bytes()
    assert schema.read(tmp_path / "a.json") == json.loads(first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert schema.dumps(json.loads(first)) == first.decode()  # a fixed point
    slower = report | {"times": {"zoo": 1.0}}
    assert schema.figures(slower) == schema.figures(report) and slower != report
    assert example(tasks=6, seed=1)[0]["table"] != report["table"]


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("summary/soup/mean", float("nan"), r"report\.summary\.soup\.mean: nan"),
        ("novelty_ratio", float("inf"), r"report\.novelty_ratio: inf"),
        ("novelty_ratio", None, r"report\.novelty_ratio: None, expected a number"),
        ("confusion_diagonal", ..., "report: missing confusion_diagonal"),
        ("summary/pdiff_global", ..., r"report\.summary: missing pdiff_global"),
        ("condition_controls/null", ..., r"condition_controls: missing null"),
        ("unseen/unseen_pair/paired/ridge", ..., r"unseen_pair\.paired: missing ridge"),
        ("unseen/unseen_pair/gap_recovered/span", ..., r"gap_recovered: missing span"),
        ("unseen/elsewhere", {}, r"unseen\.elsewhere: unknown level"),
        ("confusion/matrix", [[1.0]], r"confusion\.matrix: expected 6 x 6"),
        ("summary/base/n", 0, r"summary\.base: n=0"),
        ("version", 1, r"version: 1, expected one of \(2, 3, 4, 5\)"),
        ("unseen/unseen_pair/best_rival", ..., r"unseen_pair: missing best_rival"),
        ("unseen/unseen_pair/best_rival/method", "luck", r"accuracy: missing luck"),
        ("unseen/unseen_pair/paired/logreg", ..., r"unseen_pair\.paired: missing logreg"),
        ("claims/0/verdict", True, r"claims\[0\]\.verdict: True, expected one of \('holds'"),
        ("notes", {1: "x"}, r"notes: key 1 is int"),
        ("notes", {"a": object()}, r"notes\.a: object"),
        ("table", {}, r"table: no tasks"),
    ],
)
def test_what_is_wrong_is_refused_by_path(report, tmp_path, path, value, match):
    with pytest.raises(schema.ReportError, match=match):
        schema.write(tmp_path / "r.json", broken(report, path, value))
    assert not list(tmp_path.iterdir())


def test_a_nan_accuracy_and_a_missing_method_are_refused_before_anything_is_summed():
    seen = {"t": {key: [0.5] for key in schema.SEEN_KEYS}}
    with pytest.raises(schema.ReportError, match=r"report\.table\.t\.generated\[1\]: nan"):
        build.table({"t": seen["t"] | {"generated": [0.5, np.nan]}}, schema.SEEN_KEYS,
                    "report.table")  # fmt: skip
    with pytest.raises(schema.ReportError, match=r"report\.table\.t: missing soup"):
        build.table(
            {"t": {k: v for k, v in seen["t"].items() if k != "soup"}},
            schema.SEEN_KEYS,
            "report.table",
        )


def test_a_damaged_file_is_named(report, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(schema.dumps(report)[:100])
    with pytest.raises(schema.ReportError, match=r"r\.json: "):
        schema.read(path)


def verdicts(report):
    return {claim["name"]: claim for claim in claims.check(report)}


def test_claims_follow_the_figures_and_never_hide_a_failure(report):
    now = verdicts(report)
    assert set(now) == {
        "unseen_pair.beats_ridge",
        "unseen_pair.gap_recovered",
        "unseen_label.beats_ridge",
        "unseen_label.gap_recovered",
        "unseen_pair.beats_best_rival",
        "unseen_label.beats_best_rival",
        "unseen_corpus.beats_best_rival",
        "unseen_pair.layered_beats_best_rival",
        "unseen_label.layered_beats_best_rival",
        "unseen_corpus.layered_beats_best_rival",
        "seen.within_soup",
        "seen.confusion_diagonal",
        "sampler.few_steps",
    }
    assert [c["name"] for c in report["claims"]] == list(now)

    def after(name, path, value):
        return verdicts(broken(report, path, value))[name]

    def holds(name, path, value):
        return after(name, path, value)["verdict"] == "holds"

    pair = {"mean": 0.01, "low": 0.002, "high": 0.02, "n": 24, "confidence": 0.95}
    where = "unseen/unseen_pair/paired/ridge"
    assert holds("unseen_pair.beats_ridge", where, pair)
    assert not holds("unseen_pair.beats_ridge", where, pair | {"low": -0.001})
    where = "unseen/unseen_corpus/best_rival/paired"
    assert holds("unseen_corpus.beats_best_rival", where, pair)
    assert not holds("unseen_corpus.beats_best_rival", where, pair | {"low": -0.001})
    where = "unseen/unseen_corpus/layered_best_rival/paired"
    assert holds("unseen_corpus.layered_beats_best_rival", where, pair)
    assert not holds("unseen_corpus.layered_beats_best_rival", where, pair | {"low": -0.001})
    gap = pair | {"mean": 0.95, "low": 0.9, "high": 0.99}
    where = "unseen/unseen_pair/gap_recovered/generated"
    assert holds("unseen_pair.gap_recovered", where, gap)
    assert not holds("unseen_pair.gap_recovered", where, gap | {"mean": 0.949})
    soup = pair | {"mean": -0.005}
    assert holds("seen.within_soup", "seen_paired/soup", soup)
    assert not holds("seen.within_soup", "seen_paired/soup", soup | {"mean": -0.0051})
    assert holds("seen.confusion_diagonal", "confusion_diagonal", 0.99)
    assert not holds("seen.confusion_diagonal", "confusion_diagonal", 0.989)
    worse = {"mean": 0.8, "std": 0.0, "n": 8, "values": [0.8] * 8}
    better = worse | {"mean": 0.9, "values": [0.9] * 8}
    steps = {"euler": {"20": better}, "ddpm": {"1000": worse}}
    assert holds("sampler.few_steps", "steps", steps)
    steps = {"euler": {"20": worse}, "ddpm": {"1000": better}}
    assert not holds("sampler.few_steps", "steps", steps)


def small(tasks, gain):
    """A report over so few tasks, with generated adapters so far above (below) all rivals."""
    report = example(tasks=tasks)[0]
    report["config"]["seed"] = 0
    for level in ("unseen_pair", "unseen_label", "unseen_corpus"):
        rows = {}
        for k, (name, row) in enumerate(list(report["unseen"][level]["table"].items())[:tasks]):
            rows[name] = {key: cell["mean"] for key, cell in row.items()}
            rivals = set(schema.names.rivals("held_out")) - {"base"}
            rows[name] |= dict.fromkeys(rivals, rows[name]["logreg"])
            rows[name]["generated"] = rows[name]["logreg"] + gain + 0.02 * (-1) ** k
        report["unseen"][level] = schema.plain(build.level(rows, level))
    for cell in (cell for points in report["steps"].values() for cell in points.values()):
        cell |= {"values": cell["values"][:tasks], "n": len(cell["values"][:tasks])}
    report["claims"] = schema.plain(claims.check(report))
    return report


def test_too_few_tasks_are_said_in_the_same_words_everywhere(capsys):
    """With 4 tasks each claim is "too few to say", whichever way its figure points."""
    for gain in (0.2, -0.2):
        report = small(4, gain)
        assert [c["verdict"] for c in report["claims"]] == ["too few to say"] * 13
        assert all(
            c["text"].endswith("Fewer than 5 tasks: too few to say.") for c in report["claims"]
        )
        page = html.render(report, {}) if gain > 0 else ""
        cond_pdiff.show(report, Path("run"))
        shown, text = capsys.readouterr().out, markdown.render(report)
        assert text.count("- too few to say:") == shown.count("[too few to say]") == 13
        assert page.count("○ too few to say") == (13 if page else 0)
        for claimed in ("does not hold", "✓", "✗"):
            assert claimed not in page + text + shown
        for sentence in words.lead(report)[1:4]:
            assert "fewer than 5 tasks are too few to say" in sentence
            assert "better than" not in sentence and "worse than" not in sentence


@pytest.mark.parametrize(
    ("gain", "word"),
    [(0.2, "better than the"), (-0.2, "worse than the"), (0.0, "undecided against the")],
)
def test_five_tasks_are_enough(gain, word, capsys):
    """Three states, in the same words on the page and in the terminal."""
    report = small(5, gain)
    cond_pdiff.show(report, Path("run"))
    shown = capsys.readouterr().out
    assert "too few to say" not in {claim["verdict"] for claim in report["claims"]}
    for level, sentence in zip(report["unseen"].values(), words.lead(report)[1:4], strict=True):
        said = words.against_best(level)
        assert f"generated {word} best rival" in said and said in sentence and said in shown
        assert "too few" not in sentence


def test_the_best_rival_is_the_best_that_knows_no_more_than_the_generator():
    """Neither what saw all texts nor an oracle, however good."""
    row = {key: [0.5] for key in schema.UNSEEN_KEYS}
    strong = {"trained": [0.99], "logreg_full": [0.98], "span": [0.97], "generated": [0.7]}
    tasks = {str(k): row | strong | {"knn": [0.8], "logreg": [0.81 - k]} for k in range(2)}
    best = build.level(tasks, "unseen_pair")["best_rival"]
    assert best["method"] == "knn" and best["accuracy"] == pytest.approx(0.8)
    np.testing.assert_allclose([best["paired"][k] for k in ("mean", "low", "high")], -0.1)
    alone = {str(k): row | strong | {"base": [0.6]} for k in range(2)}
    assert build.level(alone, "unseen_pair")["best_rival"]["method"] == "base"
    both = {
        task: values | {"layered": [0.9], "generated": [0.95]} for task, values in tasks.items()
    }
    own = build.level(both, "unseen_pair")  # each is the other's rival, but not its own
    assert own["best_rival"]["method"] == "layered"
    assert own["layered_best_rival"]["method"] == "knn"
    assert own["layered_best_rival"]["paired"]["mean"] == pytest.approx(0.1)


def test_a_report_from_before_the_rivals_is_still_read(report):
    """Version 2 (docs/results): no rows of rivals, no best one; nothing is said of them."""
    old, new = (
        copy.deepcopy(report),
        set(schema.UNSEEN_KEYS) - set(schema.names.keys("held_out", 2)),
    )
    frozen = {"nearest_mean", "knn", "logreg", "lora_k", "discriminant", "logreg_full"}
    assert new == frozen | {"episodic", "episodic_mean", "episodic_logreg", "layered"}
    for level in old["unseen"].values():
        del level["best_rival"], level["layered_best_rival"]
        for part in (*level["table"].values(), *(level[k] for k in
                     ("accuracy", "gap_recovered", "paired"))):  # fmt: skip
            for key in new:
                part.pop(key, None)
    with pytest.raises(schema.ReportError, match="missing best_rival"):
        schema.validate(old)
    old["version"], old["config"]["seed"] = 2, 0
    old["claims"] = [c for c in old["claims"] if "best_rival" not in c["name"]]
    schema.validate(old)
    assert not any(schema.names.method(key).label in markdown.render(old) for key in new)
    assert "rivals that see the same texts were not measured" in words.lead(old)[1]
    assert html.render(old, {})


def test_what_was_not_measured_does_not_hold_and_says_so(report):
    bare = verdicts(report | {"unseen": {}, "steps": {}})
    for name in ("unseen_pair.beats_ridge", "unseen_label.gap_recovered", "sampler.few_steps"):
        claim = bare[name]
        assert claim["value"] is None and claim["verdict"] == "too few to say"
        assert claim["text"].startswith("Not measured")
    for verdict in ("holds", "does not hold"):
        cheat = copy.deepcopy(report)
        cheat["claims"][0] |= {"verdict": verdict, "value": None}
        with pytest.raises(schema.ReportError, match=f"{verdict} without a value"):
            schema.validate(cheat)
