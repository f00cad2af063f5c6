"""The README's results: a report.json as markdown.

python -m experiments.report.markdown docs/results/text_full/report.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import schema

SEEN = (
    ("base", "base model (chance)"),
    ("trained", "trained adapter"),
    ("soup", "soup of the task's trained adapters"),
    ("generated", "**generated (ours)**"),
    ("mean_adapter", "mean adapter of all tasks"),
    ("pdiff_global", "Cond P-Diff, global normalisation"),
    ("pdiff_task_norm", "Cond P-Diff, per-task normalisation (tells the task)"),
)
UNSEEN = (
    ("base", "base model (chance)"),
    ("trained", "trained adapter"),
    ("generated", "**generated (ours)**"),
    ("ridge", "kernel ridge, condition to adapter"),
    ("nearest", "nearest-condition soup"),
    ("softmax", "softmax-weighted soup"),
    ("multitask", "one multi-task adapter"),
    ("mean_adapter", "mean adapter"),
    ("span", "projection of the trained adapter on the zoo's span (oracle)"),
)
LEVELS = {
    "unseen_pair": "unseen pairs of seen labels",
    "unseen_label": "unseen labels",
    "unseen_corpus": "unseen corpora",
}


def render(report: Mapping[str, Any]) -> str:
    """Tables of seen and held-out accuracies, then every claim with its verdict."""
    command = report["config"]["command"]
    lines = [f"Made by `{command}` (2 cores, seed {report['config']['seed']}).", ""]
    tasks = report["summary"]["generated"]["n"]
    lines += [
        f"Test accuracy in %, mean ± std over tasks; {tasks} seen tasks, mean over samples.",
        "",
        "| seen tasks | accuracy |",
        "|---|---|",
    ]
    lines += [f"| {text} | {_cell(report['summary'][key])} |" for key, text in SEEN]
    levels = [level for level in LEVELS if level in report["unseen"]]
    lines += ["", "| held-out tasks: accuracy (share of the gap recovered) |" + "".join(
        f" {LEVELS[level]} ({report['unseen'][level]['accuracy']['generated']['n']}) |"
        for level in levels
    )]  # fmt: skip
    lines.append("|---|" + "---|" * len(levels))
    for key, text in UNSEEN:
        cells = []
        for level in levels:
            part = report["unseen"][level]
            gap = part["gap_recovered"].get(key)
            share = f" ({100 * gap['mean']:.0f} %)" if gap else ""
            cells.append(f" {_cell(part['accuracy'][key])}{share} |")
        lines.append(f"| {text} |" + "".join(cells))
    lines += ["", "What was asked for, and whether it holds:", ""]
    for claim in report["claims"]:
        verdict = claim["verdict"]
        verdict = f"**{verdict}**" if verdict == schema.FAILS else verdict
        lines.append(f"- {verdict}: {claim['text']}")
    controls = ", ".join(
        f"{name} {100 * cell['mean']:.1f} %" for name, cell in report["condition_controls"].items()
    )
    lines += [
        f"- Seen tasks with another condition: {controls}. Novelty ratio"
        f" {report['novelty_ratio']:.2f}, diversity ratio {report['diversity_ratio']:.2f}"
        " (1: as far apart as real training runs).",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Mapping[str, Any]) -> str:
    return f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}"


def main(argv: Sequence[str]) -> int:
    """Print the markdown of one report."""
    if len(argv) != 1:
        print("usage: python -m experiments.report.markdown REPORT.json", file=sys.stderr)
        return 2
    sys.stdout.write(render(schema.read(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
