"""The plot of the claim `lcm_lora`: Fréchet distance and style score over evaluations, four lines.

``python -m experiments.styles.lines docs/results/claims/lcm_lora.json lcm_lora.svg``
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import plots
from experiments.workdir import read_json
from jlora.io import safetensors_file

KEY = re.compile(r"(.+): (system|baseline), (\d+) steps: (FID|style score)")
NAMES = {  # whether the style is added to the base, and what is drawn -> how the line is called
    (False, "baseline"): "base, Euler",
    (False, "system"): "base + tau, jumps",
    (True, "baseline"): "base + style, Euler",
    (True, "system"): "base + 0.8 style + tau, jumps",
}


def lines(more: Mapping[str, float], figure: str) -> dict[str, dict[int, float]]:
    """The four lines: name -> evaluations -> mean over styles.

    Args:
      more: of one seed's figures.
      figure: "FID" or "style score", which only added styles have.

    Raises:
      ValueError: none of the keys is one of the claim's.
    """
    matches = [(m, value) for key, value in more.items() if (m := KEY.fullmatch(key))]
    added = {m[1] for m, _ in matches if m[4] == "style score"}
    kept: dict[str, dict[int, list[float]]] = {}
    for m, value in matches:
        if m[4] == figure:
            line = kept.setdefault(NAMES[m[1] in added, m[2]], {})
            line.setdefault(int(m[3]), []).append(value)
    if not kept:
        raise ValueError(f"figures: got {sorted(more)[:3]}, expected keys as {KEY.pattern!r}")
    return {name: {n: float(np.mean(v)) for n, v in sorted(line.items())}
            for name, line in kept.items()}  # fmt: skip


def plot(record: Mapping[str, Any]) -> str:
    """The SVG of a record, of its first seed.

    Args:
      record: of the claim.
    """
    more = record["figures"][0]["more"]

    def draw(figure: Any) -> None:
        for axis, name in zip(figure.subplots(1, 2), ("FID", "style score"), strict=True):
            for label, line in lines(more, name).items():
                axis.plot(list(line), list(line.values()), marker="o", label=label)
            axis.set_xscale("log", base=2)
            axis.set(xlabel="evaluations of the model", title=name)
        figure.axes[0].legend()

    return plots.svg(draw, (9.0, 3.8), "Quality over evaluations with and without LCM-LoRA")


def main(argv: list[str]) -> None:
    """Reads a record and writes the plot."""
    if len(argv) != 3:
        raise SystemExit("usage: python -m experiments.styles.lines RECORD.json OUT.svg")
    record = read_json(Path(argv[1]), dict, "run the claim again")
    safetensors_file.write_bytes(Path(argv[2]), plot(record).encode())


if __name__ == "__main__":
    main(sys.argv)
