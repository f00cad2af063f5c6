"""The README's results: a report.json as markdown.

python -m experiments.report.markdown docs/results/text_full/report.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import names, schema


def render(report: Mapping[str, Any]) -> str:
    """Tables of seen and held-out accuracies, then every claim with its verdict."""
    command = report["config"]["command"]
    lines = [f"Written by `{command}` (2 cores, seed {report['config']['seed']}).", ""]
    tasks = report["summary"]["generated"]["n"]
    lines += [
        f"Test accuracy in %, mean ± std over tasks; {tasks} seen tasks, mean over samples.",
        "",
        "| seen tasks | accuracy |",
        "|---|---|",
    ]
    for key in names.keys(names.SEEN):
        lines.append(f"| {_label(key)} | {_cell(report['summary'][key])} |")
    levels = [level for level in names.LEVELS if level in report["unseen"]]
    lines += ["", "| held-out tasks: accuracy (share of the gap recovered) |" + "".join(
        f" {names.LEVELS[level]} ({report['unseen'][level]['accuracy']['generated']['n']}) |"
        for level in levels
    )]  # fmt: skip
    lines.append("|---|" + "---|" * len(levels))
    for key in names.keys(names.HELD_OUT, report["version"]):
        cells = []
        for level in levels:
            part = report["unseen"][level]
            gap = part["gap_recovered"].get(key)
            share = f" ({100 * gap['mean']:.0f} %)" if gap else ""
            cells.append(f" {_cell(part['accuracy'][key])}{share} |")
        lines.append(f"| {_label(key)} |" + "".join(cells))
    lines += ["", "Targets, and whether they are met:", ""]
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


def _label(key: str) -> str:
    label = names.method(key).label
    return f"**{label}**" if key == "generated" else label


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
