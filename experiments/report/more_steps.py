"""Steps saved by a start: accuracy of held-out tasks after k more steps of training on all texts.

The section `more_steps` of report.json: ``{steps: [0, k, ...], levels: {level: {starts: {start:
[cell per k]}, trained: cell, full: cell or null, reach: {start: k or null}}}}``. A start reaches
training at the first k whose mean is at most a point below the mean of the trained adapters; null:
not within the steps taken. Only runs that measured it have the section.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from experiments.report import names, plots, tables

SLACK = 0.01  # a point: differences below it are noise of a hundred texts
STARTS = {
    "generated": ("from the generated adapter", names.VERMILION, "o"),
    "mean_adapter": ("from the mean adapter", names.GREY, "s"),
    "zero": ("from zero", names.BLUE, "^"),
}


def section(
    steps: Sequence[int],
    levels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    trained: Mapping[str, float],
    full: Mapping[str, float],
) -> dict[str, Any]:
    """The section of report.json.

    Args:
      steps: numbers of steps, 0 first.
      levels: level -> task -> start -> accuracy at each of `steps`.
      trained: task -> accuracy of its trained adapters.
      full: task -> accuracy of full fine-tuning; empty: not measured.
    """
    out: dict[str, Any] = {}
    for level, tasks in levels.items():
        goal = np.mean([trained[task] for task in tasks])
        starts, reach = {}, {}
        for start in STARTS:
            values = np.asarray([row[start] for row in tasks.values()], np.float64)
            starts[start] = [_cell(column) for column in values.T]
            good = values.mean(0) >= goal - SLACK
            reach[start] = int(steps[int(good.argmax())]) if good.any() else None
        out[level] = {
            "starts": starts,
            "trained": _cell([trained[task] for task in tasks]),
            "full": _cell([full[task] for task in tasks]) if full else None,
            "reach": reach,
        }
    return {"steps": [int(k) for k in steps], "levels": out}


def _cell(values: Any) -> dict[str, Any]:
    array = np.asarray(values, np.float64)
    std = float(array.std(ddof=1)) if array.size > 1 else 0.0
    return {"mean": float(array.mean()), "std": std, "n": int(array.size)}


def plot(more_steps: Mapping[str, Any]) -> str:
    """Accuracy against further steps, a panel per level: SVG text."""
    steps, levels = more_steps["steps"], list(more_steps["levels"])
    places = np.arange(len(steps))  # evenly spaced: 0 has no place on a log axis

    def draw(figure):
        axes = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
        for axis, level in zip(axes, levels, strict=True):
            part = more_steps["levels"][level]
            for key, (label, colour, marker) in STARTS.items():
                mean = [cell["mean"] for cell in part["starts"][key]]
                axis.plot(places, mean, marker=marker, color=colour, ms=6, label=label)
            lines: list[tuple[str, Any, str, Any]] = [
                ("trained adapter", part["trained"], names.INK, (0, (4, 3)))
            ]
            if part["full"]:
                lines.append(("full fine-tuning", part["full"], names.PURPLE, (0, (1, 1.3))))
            for label, cell, colour, style in lines:
                axis.axhline(cell["mean"], color=colour, lw=1.4, ls=style, label=label, zorder=0)
            axis.set_title(names.level(level))
            axis.set_xticks(places, [str(k) for k in steps])
            axis.set_xlabel("steps of training on all texts")
            plots.percent_axis(axis, "y")
        axes[0].set_ylabel("accuracy (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)

    return plots.svg(draw, (2.2 + 2.9 * len(levels), 3.9), "accuracy after more steps of training")


def sentence(more_steps: Mapping[str, Any], level: str) -> str:
    """How many steps each start saves on the tasks of one level."""
    part, most = more_steps["levels"][level], more_steps["steps"][-1]
    goal = f"{100 * part['trained']['mean']:.1f} %"

    def after(start: str) -> str:
        reach = part["reach"][start]
        return f"{reach} steps" if reach is not None else f"more than {most} steps"

    said = ", ".join(f"{after(key)} {label}" for key, (label, _, _) in STARTS.items())
    return f"training on all texts is within a point of trained adapters ({goal}) after {said}"


def table(more_steps: Mapping[str, Any], level: str) -> str:
    """One level: a row per start, then training and full fine-tuning (HTML)."""
    part, steps = more_steps["levels"][level], more_steps["steps"]
    rows = []
    for key, (label, _, _) in STARTS.items():
        reach = part["reach"][key]
        said = f"{reach} steps" if reach is not None else f"not within {steps[-1]}"
        rows.append([escape(label), *map(tables.cell, part["starts"][key]), said])
    empty = ["–"] * (len(steps) - 1)
    rows.append(["trained adapter", *empty, tables.cell(part["trained"]), "–"])
    if part["full"]:
        label = "full fine-tuning of the adapted layers"
        rows.append([label, *empty, tables.cell(part["full"]), "–"])
    head = ["", *(f"{k} steps" for k in steps), "reaches training after"]
    return tables.table(head, rows, kind="tasks")
