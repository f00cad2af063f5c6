"""report.html and the picture sheets of a run of styles: one file without scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pictures.sampling import sheet
from experiments.report import html, names, plots, tables
from experiments.report.page import PAGE
from experiments.styles.generate import Written
from experiments.styles.sample import METHODS, REAL, Drawings
from jlora.io import safetensors_file

COLUMNS = 12  # pictures of a row
STRIPS = {
    "condition": "conditions, through the flow",
    "weight": "weights of the two trained adapters",
    "latent": "latents of Cond P-Diff's autoencoder",
}


def walks(written: Written) -> str:
    """Denoising trajectories of Cond P-Diff among the zoo's latents, in two principal components.

    Args:
      written: latents and trajectories.
    """
    centre = written.latents.mean(0)
    axes = np.linalg.svd(written.latents - centre, full_matrices=False)[2][:2]
    zoo = (written.latents - centre) @ axes.T
    paths = (written.walk - centre) @ axes.T

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.scatter(*zoo.T, s=14, facecolors="none", edgecolors=names.GREY, label="zoo")
        for n, path in enumerate(paths):
            axis.plot(*path.T, linewidth=0.9, label="from noise" if n == 0 else None)
            axis.scatter(*path[-1], s=30, marker="x")
        axis.legend()
        axis.set(xlabel="first principal component of the zoo's latents", ylabel="second")

    return plots.svg(draw, (5.3, 4.2), "Denoising trajectories of Cond P-Diff")


def picture(path: Path, alt: str) -> str:
    """A PNG file as an element of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _figure(content: str, caption: str) -> str:
    return html.figure(content, caption, wide=True)


def _interval(x: Mapping[str, Any], digits: int = 4) -> str:
    if x["n"] < 2:
        return f"{x['mean']:.{digits}f}"
    return f"{x['mean']:.{digits}f}<small>{x['low']:.{digits}f} to {x['high']:.{digits}f}</small>"


def _losses(report: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Loss and share of the gap, a column per level."""
    levels = report["losses"]
    head = ["", *(f"{escape(n)} ({len(part['styles'])})" for n, part in levels.items())]
    loss = [[label, *(_interval(p["loss"][k]) if k in p["loss"] else "–" for p in levels.values())]
            for k, label in labels.items()]  # fmt: skip
    gap = [[label, *(_interval(p["gap"][k], 2) if k in p["gap"] else "–" for p in levels.values())]
           for k, label in labels.items()]  # fmt: skip
    rivals = next(iter(levels.values()))["flow minus"]
    less = [[labels[k], *(_interval(p["flow minus"][k], 5) for p in levels.values())]
            for k in rivals]  # fmt: skip
    return (
        "<h3>Flow loss of held-out pictures</h3>" + tables.table(head, loss)
        + "<h3>Share of the gap between no LoRA and the style's own</h3>" + tables.table(head, gap)
        + "<h3>Loss of the flow minus that of its rivals (below 0: better)</h3>"
        + tables.table(head, less)
    )  # fmt: skip


def _samples(report: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A table of the figures of samples per level."""
    out = ""
    for level, part in report["samples"].items():
        rows = [
            [labels.get(method, method), *(f"{part[method][figure]['mean']:.3f}<small>± "
             f"{part[method][figure]['std']:.3f}</small>"
             for figure in ("frechet", "style distance", "label"))]
            for method in (*METHODS, REAL) if method in part
        ]  # fmt: skip
        out += f"<h3>{escape(level)}: {escape(', '.join(part['styles']))}</h3>"
        out += tables.table(["", "Fréchet distance", "style distance", "right labels"], rows)
    return out


def sheets(workdir: Path, drawings: Drawings, real: Mapping[str, np.ndarray]) -> dict[str, Path]:
    """A sheet per style, methods from top to bottom, and one per interpolation.

    Args:
      workdir: PNG files are written there.
      drawings: of the stage `sample`.
      real: held-out pictures of each style.
    """
    out = {}
    for k, style in enumerate(drawings.styles):
        drawn = [drawings.pixels[style][m][0][:COLUMNS] for m in METHODS
                 if m in drawings.pixels[style]]  # fmt: skip
        out[style] = workdir / f"style_{k:02d}.png"
        sheet([real[style][:COLUMNS], *drawn], out[style])
    for kind, pixels in drawings.strips.items():
        out[kind] = workdir / f"strip_{kind}.png"
        sheet(list(pixels.swapaxes(0, 1)), out[kind])
    return out


def write(
    workdir: Path, report: Mapping[str, Any], drawings: Drawings, written: Written,
    real: Mapping[str, np.ndarray], labels: Mapping[str, str],
) -> None:  # fmt: skip
    """Writes the page and its pictures.

    Args:
      workdir: of the run.
      report: of the stage `report`.
      drawings: pictures that were drawn.
      written: latents and trajectories.
      real: held-out pictures of each style.
      labels: names of the methods.
    """
    files = sheets(workdir, drawings, real)
    grids = "".join(
        _figure(picture(files[style], style),
                f"{escape(style)} ({escape(drawings.level[style])}): real pictures, then "
                + ", ".join(labels[m] for m in METHODS if m in drawings.pixels[style]))
        for style in drawings.styles
    )  # fmt: skip
    strips = "".join(
        _figure(picture(files[kind], kind), f"From one seen style to another by {said}.")
        for kind, said in STRIPS.items()
    )
    said = "".join(
        f"<p>{'✓ holds' if c['holds'] else '✗ does not hold'}: {escape(c['text'])}</p>"
        for c in report["claims"]
    )
    settings = "".join(f"<p>{escape(k)}: {escape(str(v))}</p>" for k, v in
                       report["settings"].items())  # fmt: skip
    sections = (
        ("summary", "Summary", said + _losses(report, labels)),
        ("samples", "Pictures that were drawn", _samples(report, labels) + grids),
        ("between", "Between styles", strips),
        ("walks", "From noise", _figure(walks(written), "Five samples of Cond P-Diff.")),
        ("settings", "Settings", settings),
    )
    body = "".join(f'<section id="{n}"><h2>{t}</h2>\n{x}</section>\n' for n, t, x in sections)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    s = report["settings"]
    facts = escape(f"base {s['base']} · styles {s['preset']} · rank {s['rank']}")
    text = PAGE.substitute(facts=facts, links=links, body=body)
    text = text.replace("from task descriptions", "from pictures of a style")
    safetensors_file.write_bytes(workdir / "report.html", text.encode())
