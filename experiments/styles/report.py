"""Stage `report`: report.json, report.html and the pictures of a run of styles.

Losses are compared by a paired bootstrap over styles. The share of the gap is
(base - method) / (base - original), sums over styles: 0 is the base without an adapter, 1 the
adapter that was trained on the style.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pipeline import Context, Done, Stage
from experiments.report import bootstrap
from experiments.stages.report import environment
from experiments.styles import page
from experiments.styles.catalogue import HELD_OUT, LEVELS
from experiments.styles.evaluate import BASE, FEW, OWN, PROJECTED, SOUP, Scores
from experiments.styles.generate import Written
from experiments.styles.sample import Drawings
from experiments.workdir import write_json

LABELS = {
    BASE: "no LoRA",
    OWN: "original: LoRA trained on the style",
    PROJECTED: "original in the common basis (oracle)",
    SOUP: "soup of the style's own",
    "mean": "mean adapter",
    "nearest": "nearest-condition soup",
    "softmax": "softmax soup",
    "ridge": "kernel ridge",
    FEW: "LoRA trained on the same pictures",
    "pdiff": "Cond P-Diff",
    "flow": "flow (ours)",
    "shuffled": "flow, pictures of another style (control)",
}
RIVALS = ("nearest", "softmax", "ridge", "mean", "pdiff", FEW, "shuffled")
SLACK = 1.02  # of the Fréchet distance of the soup, in the paper's claim as checked here


def losses(scores: Scores) -> dict[str, Any]:
    """Per level: mean loss, share of the gap, and differences of the flow to its rivals.

    Args:
      scores: of the stage `evaluate`.
    """
    out: dict[str, Any] = {}
    parts = {level: [s for s in scores.styles if scores.level[s] == level] for level in LEVELS}
    parts["all held out"] = [s for level in HELD_OUT for s in parts[level]]
    for level, styles in parts.items():
        if not styles:
            continue
        of = {
            name: np.asarray([scores.loss[name][s] for s in styles])
            for name in LABELS
            if all(s in scores.loss[name] for s in styles)
        }
        gap = of[BASE] - of[OWN]
        useful = gap > 0  # where training did not help, no share of it can be said
        out[level] = {
            "styles": styles,
            "loss": {name: bootstrap.mean(x) for name, x in of.items()},
            "gap": {
                name: bootstrap.ratio((of[BASE] - x)[useful], gap[useful])
                for name, x in of.items()
                if useful.any()
            },
            "flow minus": {n: bootstrap.paired(of["flow"], of[n]) for n in RIVALS},
            "no gap": [s for s, good in zip(styles, useful, strict=True) if not good],
        }
    return out


def table(drawings: Drawings) -> dict[str, Any]:
    """Per level: every figure of samples by method, mean and deviation over styles and seeds.

    Args:
      drawings: of the stage `sample`.
    """
    out: dict[str, Any] = {}
    for level in dict.fromkeys(drawings.level.values()):
        styles = [s for s in drawings.styles if drawings.level[s] == level]
        methods = list(dict.fromkeys(m for s in styles for m in drawings.figures[s]))
        out[level] = {"styles": styles} | {
            method: {
                figure: {"mean": float(np.mean(rows)), "std": float(np.std(rows))}
                for figure in ("frechet", "style distance", "label")
                for rows in [[np.mean(drawings.figures[s][method][figure]) for s in styles]]
            }
            for method in methods
        }
    return out


def claims(results: dict[str, Any], drawings: Drawings) -> list[dict[str, Any]]:
    """What was asked for, with intervals; nothing is rounded in anybody's favour.

    Args:
      results: of `losses`.
      drawings: of the stage `sample`.
    """
    out = []
    for level, part in results.items():
        if level == "seen" or len(part["styles"]) < 2:
            continue
        d = part["flow minus"]["ridge"]
        out.append({
            "text": f"{level}: flow loss of generated adapters minus kernel ridge's"
            f" {d['mean']:+.5f} ({d['low']:+.5f} to {d['high']:+.5f}, {d['n']} styles)",
            "holds": d["high"] < 0,
        })  # fmt: skip
    seen = [s for s in drawings.styles if drawings.level[s] == "seen"]
    for name in ("pdiff", "flow") if len(seen) > 1 else ():
        mine, soup = (
            np.asarray([np.mean(drawings.figures[s][m]["frechet"]) for s in seen])
            for m in (name, SOUP)
        )
        d = bootstrap.paired(mine, SLACK * soup)
        out.append({
            "text": f"seen: Fréchet distance of {LABELS[name]} minus {SLACK} times that of the"
            f" soup {d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}, {d['n']} styles)",
            "holds": d["high"] <= 0,
        })  # fmt: skip
    return out


def read(context: Context, prepared: None, done: Done) -> dict[str, Any]:
    """Writes report.json, report.html and PNG files into the workdir; returns the report."""
    world, scores = context.products["data"], context.products["evaluate"]
    drawings: Drawings = context.products["sample"]
    written: Written = context.products["generate"]
    by_style = losses(scores)
    kept = {path: float(np.min(x)) for path, x in written.prepared.given.kept.items()}
    report = {
        "command": context.command,
        "settings": dataclasses.asdict(world.settings),
        "environment": environment(),
        "base": {k: world.base.card.get(k) for k in ("steps", "parameters")},
        "few steps": scores.few_steps,
        "energy kept by the common basis": kept,
        "losses": by_style,
        "loss by style": scores.loss,
        "samples": table(drawings),
        "claims": claims(by_style, drawings),
    }
    write_json(context.workdir / "report.json", report)
    real = {style: world.test[style].pixels for style in drawings.styles}
    page.write(context.workdir, report, drawings, written, real, LABELS)
    return report


def lines(report: dict[str, Any], workdir: Path) -> list[str]:
    """The report in a few lines.

    Args:
      report: of `read`.
      workdir: of the run.
    """
    out = []
    for level, part in report["losses"].items():
        out.append(f"\n{level}, {len(part['styles'])} styles: flow loss, share of the gap")
        for name in (n for n in LABELS if n in part["loss"]):
            share = part["gap"].get(name)
            said = f"{100 * share['mean']:6.1f} %" if share else ""
            out.append(f"  {LABELS[name]:42s} {part['loss'][name]['mean']:.5f} {said}")
    out.append("")
    out += [f"[{'holds' if c['holds'] else 'does not hold'}] {c['text']}" for c in report["claims"]]
    return [*out, f"\nReport: {workdir / 'report.html'}"]


def describe(report: dict[str, Any]) -> str:
    """The report in one line."""
    return f"{sum(c['holds'] for c in report['claims'])} of {len(report['claims'])} claims hold"


STAGE = Stage(
    name="report",
    inputs=("data", "generate", "evaluate", "sample"),
    unit="report",
    read=read,
    describe=describe,
    kept=False,
)
