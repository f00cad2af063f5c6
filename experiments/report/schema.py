"""The shape of report.json: what must be in it, what is refused, how it is written.

Top level: config, environment, table, summary, seen_paired, confusion, confusion_diagonal,
condition_controls, novelty_ratio, diversity_ratio, unseen, steps, curves, audit, claims, notes,
times; `more_steps` where it was measured. A *cell* is {mean, std, n} with an optional list
`values`; an *interval* is {mean, low, high, n, confidence}. Everything but `times` is a pure
function of settings and data: `figures` drops it.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import names
from jlora.io import FormatError
from jlora.io.json_file import read_json

VERSION = 5  # 3: rivals that see the same K texts, the best of them per level; 4: episodic;
# 5: layered
READABLE = (2, 3, 4, 5)  # 2: a claim has a verdict of three, not a yes or no
SEEN_KEYS = names.keys(names.SEEN)
UNSEEN_KEYS = names.keys(names.HELD_OUT)
USER_KEYS = ("base", "generated")  # a user's task may have no trained adapter at all
CONTROLS = ("shuffled", "null", "paraphrased")
RIVALS = ("best_rival", "layered_best_rival")  # entries of a level
LEVELS = tuple(names.LEVELS)
CLAIM_KEYS = ("name", "target", "value", "verdict", "text")
VERDICTS = HOLDS, FAILS, TOO_FEW = ("holds", "does not hold", "too few to say")
TOP = (
    "version config environment table summary seen_paired confusion confusion_diagonal "
    "condition_controls novelty_ratio diversity_ratio unseen steps curves audit claims notes times"
).split()


class ReportError(ValueError):
    """report.json is not what it has to be; the text starts with the path of the offender."""


def plain(value: Any, path: str = "report") -> Any:
    """The value as JSON types: floats at 7 significant digits (float32), arrays as lists.

    Raises:
      ReportError: NaN or infinity, keys that are no strings, types JSON does not know; by path.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.bool_, np.integer, int)):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not math.isfinite(number):
            raise ReportError(f"{path}: {number} is not a figure; expected a finite number")
        return float(f"{number:.7g}")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ReportError(f"{path}: key {key!r} is {type(key).__name__}, expected str")
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "__array__"):  # numpy and JAX arrays, scalars included
        return plain(np.asarray(value).tolist(), path)
    raise ReportError(f"{path}: {type(value).__name__} cannot be written as JSON")


def _need(mapping: Any, keys: Any, path: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ReportError(f"{path}: {type(mapping).__name__}, expected an object")
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ReportError(f"{path}: missing {', '.join(missing)}")


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ReportError(f"{path}: {value!r}, expected a number")


def _numbers(mapping: Any, keys: tuple[str, ...], path: str) -> None:
    _need(mapping, keys, path)
    for key in keys:
        _number(mapping[key], f"{path}.{key}")


def _cell(cell: Any, path: str) -> None:
    _numbers(cell, ("mean", "std", "n"), path)
    if cell["n"] < 1 or cell["std"] < 0:
        raise ReportError(f"{path}: n={cell['n']}, std={cell['std']}; expected n >= 1, std >= 0")
    if "values" in cell and len(cell["values"]) != cell["n"]:
        raise ReportError(f"{path}.values: {len(cell['values'])} values, expected n={cell['n']}")


def _interval(interval: Any, path: str) -> None:
    _numbers(interval, ("mean", "low", "high", "n", "confidence"), path)
    if not interval["low"] <= interval["high"]:
        raise ReportError(f"{path}: low {interval['low']} above high {interval['high']}")


def _cells(table: Any, keys: tuple[str, ...], path: str) -> None:
    _need(table, keys, path)
    for key, cell in table.items():
        _cell(cell, f"{path}.{key}")


def required(level: str, version: int = VERSION) -> tuple[str, ...]:
    """Methods that every task of a held-out level must have, in a report of some version."""
    return USER_KEYS if level == "user" else names.keys(names.HELD_OUT, version)


def _level(level: Any, keys: tuple[str, ...], path: str) -> None:
    _need(level, ("table", "accuracy", "gap_recovered", "dropped", "paired"), path)
    for key in RIVALS:
        if key in level:
            best = level[key]
            _need(best, ("method", "accuracy", "paired"), f"{path}.{key}")
            _need(level["accuracy"], (best["method"],), f"{path}.accuracy")
            _number(best["accuracy"], f"{path}.{key}.accuracy")
            _interval(best["paired"], f"{path}.{key}.paired")
    if not level["table"]:
        raise ReportError(f"{path}.table: no tasks")
    for task, row in level["table"].items():
        _cells(row, keys, f"{path}.table.{task}")
    _cells(level["accuracy"], keys, f"{path}.accuracy")
    methods = [key for key in keys if key not in ("base", "trained")]
    _need(level["gap_recovered"], methods, f"{path}.gap_recovered")
    baselines = [key for key in methods if key != "generated"]
    _need(level["paired"], baselines, f"{path}.paired")
    for key, interval in level["gap_recovered"].items():
        if interval is not None:  # no task with a gap: nothing to recover
            _interval(interval, f"{path}.gap_recovered.{key}")
    for key, pair in level["paired"].items():
        _interval(pair, f"{path}.paired.{key}")


def _more_steps(more_steps: Any, path: str) -> None:
    _need(more_steps, ("steps", "levels"), path)
    for name, level in more_steps["levels"].items():
        here = f"{path}.levels.{name}"
        if name not in LEVELS:
            raise ReportError(f"{here}: unknown level, expected one of {LEVELS}")
        _need(level, ("starts", "trained", "full", "reach"), here)
        for start, cells in level["starts"].items():
            if len(cells) != len(more_steps["steps"]):
                raise ReportError(
                    f"{here}.starts.{start}: {len(cells)} cells, "
                    f"expected {len(more_steps['steps'])}"
                )
            for k, cell in enumerate(cells):
                _cell(cell, f"{here}.starts.{start}[{k}]")
        for key in ("trained", "full"):
            if level[key] is not None:
                _cell(level[key], f"{here}.{key}")


def validate(report: Any) -> None:
    """Checks structure and types of a report that went through `plain`.

    Raises:
      ReportError: the first thing that is missing or wrong, by path.
    """
    _need(report, TOP, "report")
    if report["version"] not in READABLE:
        raise ReportError(f"report.version: {report['version']}, expected one of {READABLE}")
    if not report["table"]:
        raise ReportError("report.table: no tasks")
    for task, row in report["table"].items():
        _cells(row, SEEN_KEYS, f"report.table.{task}")
    _cells(report["summary"], SEEN_KEYS, "report.summary")
    for key, pair in report["seen_paired"].items():
        _interval(pair, f"report.seen_paired.{key}")
    confusion = report["confusion"]
    _need(confusion, ("labels", "matrix"), "report.confusion")
    size = len(confusion["labels"])
    if [len(row) for row in confusion["matrix"]] != [size] * size:
        raise ReportError(f"report.confusion.matrix: expected {size} x {size}, one a label")
    for name in ("confusion_diagonal", "novelty_ratio", "diversity_ratio"):
        _number(report[name], f"report.{name}")
    _cells(report["condition_controls"], CONTROLS, "report.condition_controls")
    for name, level in report["unseen"].items():
        if name not in LEVELS:
            raise ReportError(f"report.unseen.{name}: unknown level, expected one of {LEVELS}")
        if report["version"] >= 3:
            _need(level, ("best_rival",), f"report.unseen.{name}")
        _level(level, required(name, report["version"]), f"report.unseen.{name}")
    for sampler, points in report["steps"].items():
        for count, cell in points.items():
            if not count.isdigit():
                raise ReportError(f"report.steps.{sampler}.{count}: expected a number of steps")
            _cell(cell, f"report.steps.{sampler}.{count}")
    if "more_steps" in report:  # of runs that measured it
        _more_steps(report["more_steps"], "report.more_steps")
    for name, curve in report["curves"].items():
        _need(curve, ("step", "value"), f"report.curves.{name}")
        if len(curve["step"]) != len(curve["value"]) or not curve["step"]:
            raise ReportError(
                f"report.curves.{name}: {len(curve['step'])} steps, {len(curve['value'])} values"
            )
    for i, claim in enumerate(report["claims"]):
        _need(claim, CLAIM_KEYS, f"report.claims[{i}]")
        if claim["verdict"] not in VERDICTS:
            raise ReportError(
                f"report.claims[{i}].verdict: {claim['verdict']!r}, expected one of {VERDICTS}"
            )
        if claim["value"] is None and claim["verdict"] != TOO_FEW:
            raise ReportError(f"report.claims[{i}]: {claim['verdict']} without a value")


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be bitwise the same when the same settings run again."""
    return {key: value for key, value in report.items() if key != "times"}


def dumps(report: Any) -> str:
    """Deterministic text of a validated report: keys sorted, one float format."""
    report = plain(report)
    validate(report)
    return json.dumps(report, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write(path: Path | str, report: Any) -> None:
    """Validates, then writes through a temp file and a rename: never half a report.

    Raises:
      ReportError: as `plain` and `validate`; nothing is written then.
    """
    path = Path(path)
    text = dumps(report)
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(text, encoding="utf-8")
    os.replace(temp, path)


def read(path: Path | str) -> dict[str, Any]:
    """Reads and validates a report.

    Raises:
      ReportError: unreadable JSON or a wrong structure, with the file's name.
    """
    try:
        report = read_json(path)
    except FormatError as error:
        raise ReportError(str(error)) from error
    try:
        validate(report)
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error
    return report
