r"""The study's figures: best and spread of every variant, as JSON, Markdown and a plot.

=========  ==============================================================================
v, k, s    variant, rank, seed
eta        learning rate; t: task
x          test accuracy of a cell at a rate, on one task
=========  ==============================================================================

The rate of a variant and rank, and the rank of a variant, are those of the best mean validation
accuracy over seeds and tasks; figures are test accuracies there. Spreads are ranges of means:

.. math:: \mathrm{best}_v = \bar x(\eta^*, k^*), \quad
          \mathrm{spread}^\eta_v = \max_\eta \bar x(\eta, k^*) - \min_\eta \bar x(\eta, k^*)

likewise over ranks (each at its own best rate), and the standard deviation over seeds at the best.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.report import bootstrap
from experiments.report.plots import STYLE
from experiments.variant_study.cells import Cell
from experiments.variant_study.methods import VARIANTS
from experiments.workdir import write_json

WITHIN = 0.01  # of the best variant: what "tuned LoRA is as good" means


def summarise(cells: Sequence[Cell], tasks: Sequence[str]) -> dict[str, Any]:
    """The table and the two checks of the study.

    Args:
      cells: all that were measured; every variant has the same ranks and seeds.
      tasks: names, in the order of the cells' inner lists.
    """
    groups: dict[str, dict[int, list[Cell]]] = {}
    for c in cells:
        groups.setdefault(c.variant, {}).setdefault(c.rank, []).append(c)
    rows = {name: _row(name, ranks) for name, ranks in groups.items()}
    if "LoRA" in rows:
        for row in rows.values():
            row["minus LoRA"] = bootstrap.paired(row["per task"], rows["LoRA"]["per task"])
    best = {name: row["best"] for name, row in rows.items()}
    return {"tasks": list(tasks), "variants": rows, "checks": _checks(rows, best)}


def _row(name: str, ranks: Mapping[int, Sequence[Cell]]) -> dict[str, Any]:
    test, valid = (
        {k: np.asarray([getattr(c, split) for c in cs]) for k, cs in ranks.items()}
        for split in ("test", "validation")
    )  # fmt: skip  [seeds, rates, tasks]
    at = {k: int(v.mean((0, 2)).argmax()) for k, v in valid.items()}
    k = max(ranks, key=lambda k: valid[k].mean((0, 2)).max())
    chosen, rates = test[k][:, at[k]], ranks[k][0].rates  # [seeds, tasks]
    by_rank = [float(test[r][:, at[r]].mean()) for r in ranks]
    by_rate = test[k].mean((0, 2))
    return {
        "tags": list(VARIANTS[name].tags),
        "best": float(chosen.mean()),
        "per task": chosen.mean(0).tolist(),
        "rank": k,
        "rate": rates[at[k]],
        "rate at an end of the grid": at[k] in (0, len(rates) - 1),
        "trained numbers": ranks[k][0].size,
        "spread over rates": float(by_rate.max() - by_rate.min()),
        "spread over ranks": max(by_rank) - min(by_rank),
        "deviation over seeds": float(chosen.mean(1).std(ddof=1)) if len(chosen) > 1 else 0.0,
        "by rate": {f"{r:.3g}": float(x) for r, x in zip(rates, by_rate, strict=True)},
    }


def _checks(rows: Mapping[str, Any], best: Mapping[str, float]) -> list[dict[str, Any]]:
    rate = statistics.median(row["spread over rates"] for row in rows.values())
    spread = max(best.values()) - min(best.values())
    checks = [{
        "statement": "the spread over learning rates (median of variants) exceeds that over "
        "variants at their best",
        "figures": {"over rates": rate, "over variants": spread},
        "holds": rate > spread,
    }]  # fmt: skip
    if "LoRA" in best:
        behind = max(best.values()) - best["LoRA"]
        checks.append({
            "statement": f"tuned LoRA is within {100 * WITHIN:g} point of the best variant",
            "figures": {"behind the best": behind},
            "holds": behind <= WITHIN,
        })  # fmt: skip
    return checks


def markdown(found: Mapping[str, Any]) -> str:
    """The report as Markdown, best variant first."""
    rows = sorted(found["variants"].items(), key=lambda pair: -pair[1]["best"])
    lines = [
        "# Variants of LoRA on real tasks, tuned alike",
        "",
        f"Written by `{found['command']}`. Tasks: {', '.join(found['tasks'])}. Test accuracy in %; "
        "rate and rank by validation rows; in brackets a 95 % interval over tasks.",
        "",
        "| variant | axis | trained | best | minus LoRA | over rates | over ranks | over seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        d = row.get("minus LoRA")
        gap = f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" if d else ""
        end = " (rate at an end of its grid)" if row["rate at an end of the grid"] else ""
        spreads = (row[f"spread over {x}"] for x in ("rates", "ranks"))
        lines.append(
            f"| {name} | {', '.join(row['tags'])} | {row['trained numbers']:,} "
            f"| {100 * row['best']:.1f}{end} | {gap} "
            f"| {' | '.join(f'{100 * x:.1f}' for x in spreads)} "
            f"| ±{100 * row['deviation over seeds']:.1f} |"
        )
    lines += ["", "![Best accuracy and spread over learning rates](variants.svg)", ""]
    for check in found["checks"]:
        figures = ", ".join(f"{k} {100 * v:.1f}" for k, v in check["figures"].items())
        word = "holds" if check["holds"] else "**does not hold**"
        lines.append(f"- {word}: {check['statement']} ({figures} points).")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Best of every variant with its range over learning rates, best last (on top)."""
    rows = sorted(found["variants"].items(), key=lambda pair: pair[1]["best"])
    style: Any = STYLE | {"svg.hashsalt": "variants"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 1.2 + 0.28 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for y, (_, row) in enumerate(rows):
            values = list(row["by rate"].values())
            axis.plot([100 * min(values), 100 * max(values)], [y, y], color="#9AA3AE", linewidth=2)
            axis.plot([100 * v for v in values], [y] * len(values), "|", color="#5B6570")
            axis.errorbar(100 * row["best"], y, xerr=100 * row["deviation over seeds"], fmt="o",
                          color="#C1440E", capsize=2)  # fmt: skip
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.set_xlabel("test accuracy in %: best, its deviation over seeds, every learning rate")
        figure.savefig(file, format="svg", metadata={"Date": None})


def write(found: Mapping[str, Any], cells: Sequence[Cell], workdir: Path) -> None:
    """report.json, report.md and variants.svg into the workdir."""
    write_json(workdir / "report.json", {**found, "cells": [c._asdict() for c in cells]})
    (workdir / "report.md").write_text(markdown(found), encoding="utf-8")
    plot(found, workdir / "variants.svg")
