"""What must hold, decided from the figures of a report; a failure is stated, never hidden.

A claim is {name, target, value, verdict, text}; its verdict is one of `VERDICTS`, the same word in
report.json, on the page, in markdown and in the terminal. Fewer than `MIN_TASKS` tasks are too few
to say, whatever the figure; so is what was not measured at all, whose value is None. The targets
are set for the full run with the anonymous head; smaller runs are held to the same rule.
"""

from collections.abc import Mapping
from typing import Any

from experiments.report import bootstrap, names
from experiments.report.schema import FAILS, HOLDS, TOO_FEW

SOUP_MARGIN = 0.005  # 0.5 points of accuracy
CONFUSION_TARGET = 0.99
GAP_TARGETS = {"unseen_pair": 0.95, "unseen_label": 0.90}
LEVELS = (*GAP_TARGETS, "unseen_corpus")  # on which the best rival must be beaten
EXTRA = ("unseen_kind",)  # likewise, in a run that has such tasks
GENERATORS = {  # start of a claim's name -> (entry of a level, what is compared)
    "": ("best_rival", "generated adapters"),
    "layered_": ("layered_best_rival", "the layered discriminant"),
}
MIN_TASKS = 5  # below this a bootstrap over tasks says nothing
FEW = f"fewer than {MIN_TASKS} tasks"
FLOW, REFERENCE = ("euler", "20"), ("ddpm", "1000")


def check(report: Mapping[str, Any], *, seed: int = 0) -> list[dict[str, Any]]:
    """All claims, in the order they are shown.

    Args:
      report: needs summary, seen_paired, confusion, confusion_diagonal, unseen, steps.
      seed: of the bootstrap in the sampler comparison.
    """
    claims = []
    for level, target in GAP_TARGETS.items():
        claims += [_beats_ridge(report, level), _gap(report, level, target)]
    more = [level for level in EXTRA if level in report["unseen"]]
    for kind in GENERATORS:
        claims += [_beats_best_rival(report, level, kind) for level in (*LEVELS, *more)]
    return [*claims, _soup(report), _confusion(report), _few_steps(report, seed)]


def compared(interval: Mapping[str, Any]) -> str:
    """A paired difference: "better", "worse", "not distinguishable" or too few tasks to say."""
    if interval["n"] < MIN_TASKS:
        return TOO_FEW
    if interval["low"] > 0:
        return "better"
    return "worse" if interval["high"] < 0 else "not distinguishable"


def _claim(
    name: str, target: float, value: float | None, tasks: int, holds: bool, text: str
) -> dict[str, Any]:
    """A claim over `tasks` tasks (0: not measured)."""
    verdict = HOLDS if holds else FAILS
    if tasks < MIN_TASKS:
        verdict = TOO_FEW
        text += f" {FEW.capitalize()}: {TOO_FEW}." if tasks else ""
    return {"name": name, "target": target, "value": value, "verdict": verdict, "text": text}


def _points(x: float) -> str:
    return f"{100 * x:+.2f}".replace("-", "−")


def _span(interval: Mapping[str, Any]) -> str:
    percent = round(100 * interval["confidence"])
    return f"{percent} % interval {_points(interval['low'])} to {_points(interval['high'])}"


def _beats_ridge(report, level: str) -> dict[str, Any]:
    name, words = f"{level}.beats_ridge", names.LEVELS[level]
    if level not in report["unseen"]:
        return _claim(name, 0.0, None, 0, False, f"Not measured: this run has no {words}.")
    pair = report["unseen"][level]["paired"]["ridge"]
    text = (
        f"On {words} generated adapters minus kernel ridge: {_points(pair['mean'])} points of "
        f"accuracy over {pair['n']} tasks, {_span(pair)}; the interval must lie above 0."
    )
    return _claim(name, 0.0, pair["mean"], pair["n"], pair["low"] > 0, text)


def _beats_best_rival(report, level: str, kind: str) -> dict[str, Any]:
    key, subject = GENERATORS[kind]
    name, words = f"{level}.{kind}beats_best_rival", names.LEVELS[level]
    best = report["unseen"].get(level, {}).get(key)
    if best is None:
        text = f"Not measured: this run has no {words} with rivals."
        return _claim(name, 0.0, None, 0, False, text)
    pair, label = best["paired"], names.method(best["method"]).label
    text = (
        f"On {words} {subject} minus the best that knows no more ({label},"
        f" {100 * best['accuracy']:.1f} %): {_points(pair['mean'])} points of accuracy over"
        f" {pair['n']} tasks, {_span(pair)}; the interval must lie above 0."
    )
    return _claim(name, 0.0, pair["mean"], pair["n"], pair["low"] > 0, text)


def _gap(report, level: str, target: float) -> dict[str, Any]:
    name, words = f"{level}.gap_recovered", names.LEVELS[level]
    gap = report["unseen"].get(level, {}).get("gap_recovered", {})
    generated, ridge = gap.get("generated"), gap.get("ridge")
    if generated is None:
        text = f"Not measured: this run has no {words} that training improves."
        return _claim(name, target, None, 0, False, text)
    between = f"{100 * generated['low']:.1f} to {100 * generated['high']:.1f}"
    text = (
        f"On {words} generated adapters recover {100 * generated['mean']:.1f} % of what training "
        f"gains over the base model ({generated['n']} tasks, interval {between}); kernel ridge "
        f"{100 * ridge['mean']:.1f} %. Aim: {100 * target:.0f} %."
    )
    return _claim(
        name, target, generated["mean"], generated["n"], generated["mean"] >= target, text
    )


def _soup(report) -> dict[str, Any]:
    pair = report["seen_paired"]["soup"]
    text = (
        f"On seen tasks the mean generated adapter is {_points(pair['mean'])} points from the soup "
        f"of the task's trained adapters ({_span(pair)}); at most {100 * SOUP_MARGIN} points below "
        "is asked for."
    )
    holds = pair["mean"] >= -SOUP_MARGIN
    return _claim("seen.within_soup", -SOUP_MARGIN, pair["mean"], pair["n"], holds, text)


def _confusion(report) -> dict[str, Any]:
    value = report["confusion_diagonal"]
    text = (
        f"{100 * value:.1f} % of generated adapters are closest to the soup of the task they were "
        f"asked for; {100 * CONFUSION_TARGET:.0f} % is asked for."
    )
    tasks, holds = len(report["confusion"]["labels"]), value >= CONFUSION_TARGET
    return _claim("seen.confusion_diagonal", CONFUSION_TARGET, value, tasks, holds, text)


def _few_steps(report, seed: int) -> dict[str, Any]:
    name = "sampler.few_steps"
    few = report["steps"].get(FLOW[0], {}).get(FLOW[1], {}).get("values")
    many = report["steps"].get(REFERENCE[0], {}).get(REFERENCE[1], {}).get("values")
    if not few or not many:
        text = "Not measured: this run lacks 20 Euler steps or 1000 DDPM steps."
        return _claim(name, 0.0, None, 0, False, text)
    pair = bootstrap.paired(few, many, seed=seed)
    text = (
        f"20 flow steps minus 1000 DDPM steps: {_points(pair['mean'])} points over {pair['n']} "
        f"tasks, {_span(pair)}; it holds if the interval reaches 0 or better."
    )
    return _claim(name, 0.0, pair["mean"], pair["n"], pair["high"] >= 0, text)
