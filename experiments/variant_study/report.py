r"""The study's figures: best and spread of every variant, as JSON, Markdown and a plot per base.

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
The two checks are those of `jlora.analysis.sensitivity`, with intervals over tasks; all bases
together have the tasks of each.
"""

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
from jlora.analysis import sensitivity

WITHIN = 0.01  # of the best variant: what "tuned LoRA is as good" means
SPREAD = ("the spread over learning rates (median of variants) exceeds that over variants at their "
          "best")  # fmt: skip
TUNED = f"tuned LoRA is within {100 * WITHIN:g} point of the best variant"


def summarise(cells: Sequence[Cell], tasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The table of each base and the two checks of the study, of each base and of all together.

    Args:
      cells: all that were measured; every variant has the same ranks and seeds on a base.
      tasks: base -> names, in the order of the cells' inner lists.
    """
    bases, seen = {}, []
    for base, names in tasks.items():
        groups: dict[str, dict[int, list[Cell]]] = {}
        for c in cells:
            if c.base == base:
                groups.setdefault(c.variant, {}).setdefault(c.rank, []).append(c)
        rows = {name: _row(name, ranks) for name, ranks in groups.items()}
        if "LoRA" in rows:
            for row in rows.values():
                row["minus LoRA"] = bootstrap.paired(row["per task"], rows["LoRA"]["per task"])
        seen.append(_per_task(rows, groups))
        bases[base] = {"tasks": list(names), "variants": rows, "checks": _checks([seen[-1]])}
    return {"bases": bases, "checks": _checks(seen)}


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


def _per_task(
    rows: Mapping[str, Any], groups: Mapping[str, Mapping[int, Sequence[Cell]]]
) -> dict[str, np.ndarray]:
    """What the checks of a base compare, each [tasks]."""
    chosen = [groups[name][row["rank"]] for name, row in rows.items()]
    validation, test = (
        np.asarray([[getattr(c, split) for c in cs] for cs in chosen])
        for split in ("validation", "test")
    )
    spreads = sensitivity.spreads(validation, test)
    out = {"over rates": spreads.over_rates, "over variants": spreads.methods}
    if "LoRA" in rows:
        out["behind the best"] = sensitivity.behind(validation, spreads, list(rows).index("LoRA"))
    return out


def _checks(bases: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Both checks over the tasks of some bases."""
    every = {name: np.concatenate([b[name] for b in bases])
             for name in bases[0] if all(name in b for b in bases)}  # fmt: skip
    gap = bootstrap.paired(every["over rates"], every["over variants"])
    checks = [{
        "statement": SPREAD,
        "figures": {k: float(every[k].mean()) for k in ("over rates", "over variants")},
        "interval": gap,
        "verdict": _verdict(gap["low"] > 0, gap["high"] < 0),
    }]  # fmt: skip
    if "behind the best" in every:
        gap = bootstrap.mean(every["behind the best"])
        checks.append({
            "statement": TUNED,
            "figures": {"behind the best": gap["mean"]},
            "interval": gap,
            "verdict": _verdict(gap["high"] <= WITHIN, gap["low"] > WITHIN),
        })  # fmt: skip
    return checks


def _verdict(holds: bool, fails: bool) -> str:
    """By the whole interval."""
    return "holds" if holds else "does not hold" if fails else "undecided"


def markdown(summary: Mapping[str, Any]) -> str:
    """The report as Markdown, best variant first."""
    lines = [
        "# Variants of LoRA on real tasks, tuned alike",
        "",
        f"Written by `{summary['command']}`. Test accuracy in %, of next tokens where texts are "
        "continued; rate and rank by validation rows; in brackets a 95 % interval over tasks.",
    ]
    for base, own in summary["bases"].items():
        lines += ["", f"## {base}: {', '.join(own['tasks'])}", "", *_table(own["variants"]), "",
                  f"![Best accuracy and spread over learning rates](variants_{base}.svg)", "",
                  *_said(own["checks"])]  # fmt: skip
    if len(summary["bases"]) > 1:
        lines += ["", "## All tasks", "", *_said(summary["checks"])]
    return "\n".join(lines) + "\n"


def _table(variants: Mapping[str, Any]) -> list[str]:
    lines = [
        "| variant | axis | trained | best | minus LoRA | over rates | over ranks | over seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(variants.items(), key=lambda pair: -pair[1]["best"]):
        d = row.get("minus LoRA")
        gap = f"{100 * d['mean']:+.1f} {_interval(d)}" if d else ""
        end = " (rate at an end of its grid)" if row["rate at an end of the grid"] else ""
        spreads = (row[f"spread over {x}"] for x in ("rates", "ranks"))
        lines.append(
            f"| {name} | {', '.join(row['tags'])} | {row['trained numbers']:,} "
            f"| {100 * row['best']:.1f}{end} | {gap} "
            f"| {' | '.join(f'{100 * x:.1f}' for x in spreads)} "
            f"| ±{100 * row['deviation over seeds']:.1f} |"
        )
    return lines


def _said(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for check in checks:
        figures = ", ".join(f"{k} {100 * v:.1f}" for k, v in check["figures"].items())
        word = check["verdict"] if check["verdict"] == "holds" else f"**{check['verdict']}**"
        lines.append(f"- {word}: {check['statement']} ({figures} points; "
                     f"{_interval(check['interval'])}).")  # fmt: skip
    return lines


def _interval(d: Mapping[str, Any]) -> str:
    return f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def plot(variants: Mapping[str, Any], file: Path) -> None:
    """Best of every variant with its range over learning rates, best last (on top)."""
    rows = sorted(variants.items(), key=lambda pair: pair[1]["best"])
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


def write(summary: Mapping[str, Any], cells: Sequence[Cell], workdir: Path) -> None:
    """report.json, report.md and a plot per base into the workdir."""
    write_json(workdir / "report.json", {**summary, "cells": [c._asdict() for c in cells]})
    (workdir / "report.md").write_text(markdown(summary), encoding="utf-8")
    for base, own in summary["bases"].items():
        plot(own["variants"], workdir / f"variants_{base}.svg")
