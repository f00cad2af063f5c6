"""The plots of the report as inline SVG text: equal input, equal bytes; no clock, no randomness.

Every function returns one <svg> element. Generated is vermilion and filled, real is blue and
hollow, kernel ridge green, what sees the K texts alone orange or purple, the best rival filled, all
else grey; meaning never hangs on colour alone.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.report import names

STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": names.GREY,
    "axes.labelcolor": names.INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E9ED",
    "grid.linewidth": 0.8,
    "xtick.color": names.INK,
    "ytick.color": names.INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # real text: sharp, selectable, small
    "figure.dpi": 72,
}


def svg(draw, size: tuple[float, float], alt: str) -> str:
    """Runs ``draw(figure)`` and returns the SVG element with a description for screen readers."""
    salt = re.sub(r"\W+", "-", alt)[:40]
    style: Any = STYLE | {"svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # Identifiers must be unique over all the drawings of one page.
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'href="#', f'href="#{salt}-', text).replace("url(#", f"url(#{salt}-")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def percent_axis(axis, which: str = "x") -> None:
    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_formatter(lambda value, _: f"{round(100 * value, 2):g}")


def methods_scatter(rows: Mapping[str, Any], x: str, y: str, alt: str, size: float = 5.3) -> str:
    """Accuracy of method y against method x, a point per task, with the line of equality."""

    def draw(figure):
        axis = figure.subplots()
        a = np.asarray([row[x]["mean"] for row in rows.values()])
        b = np.asarray([row[y]["mean"] for row in rows.values()])
        low = min(a.min(), b.min()) - 0.03
        high = max(a.max(), b.max()) + 0.03
        axis.plot([low, high], [low, high], color=names.GREY, lw=1, zorder=1)
        axis.scatter(a, b, s=34, color=names.method(y).colour, alpha=0.65, lw=0, zorder=2)
        axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axis.locator_params(nbins=6)
        axis.set_xlabel(f"{names.method(x).label}, accuracy (%)")
        axis.set_ylabel(f"{names.method(y).label}, accuracy (%)")
        better, worse = int((b > a).sum()), int((b < a).sum())
        axis.text(0.03, 0.97, f"better on {better}", transform=axis.transAxes, va="top")
        axis.text(0.97, 0.03, f"worse on {worse}", transform=axis.transAxes, ha="right")
        percent_axis(axis, "x")
        percent_axis(axis, "y")

    return svg(draw, (size, size - 0.1), alt)


def gaps(unseen: Mapping[str, Any], levels: Sequence[str], methods: Sequence[str]) -> str:
    """Gap recovered by method with bootstrap intervals, one panel per level."""

    def draw(figure):
        axes = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
        rows = list(reversed(methods))
        for axis, level in zip(axes, levels, strict=True):
            for i, key in enumerate(rows):
                gap = unseen[level]["gap_recovered"].get(key)
                if gap is None:
                    continue
                colour = names.method(key).colour
                axis.plot([gap["low"], gap["high"]], [i, i], color=colour, lw=2.2)
                best = unseen[level].get("best_rival", {}).get("method", "ridge")
                filled = colour if key in ("generated", best) else "white"
                axis.plot(gap["mean"], i, "o", ms=8, mec=colour, mfc=filled, mew=1.8)
            for edge in (0, 1):
                axis.axvline(edge, color=names.INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
            left, right = axis.get_xlim()
            axis.set_xlim(min(left, -0.08), max(right, 1.08))
            axis.set_title(names.level(level))
            axis.set_xlabel("gap recovered (%)")
            axis.set_ylim(-0.6, len(rows) - 0.4)
            percent_axis(axis)
        axes[0].set_yticks(range(len(rows)), [names.method(key).label for key in rows])

    width = 2.6 + 2.9 * len(levels)
    return svg(draw, (width, 0.9 + 0.36 * len(methods)), "gap recovered by method and level")


def controls(rows: Sequence[tuple[str, Mapping[str, Any], str]]) -> str:
    """Dots with one standard deviation: (name, cell, colour), best condition first."""

    def draw(figure):
        axis = figure.subplots()
        for i, (_, cell, colour) in enumerate(reversed(rows)):
            axis.plot(
                [cell["mean"] - cell["std"], cell["mean"] + cell["std"]],
                [i, i],
                color=colour,
                lw=2.2,
                alpha=0.6,
            )
            axis.plot(cell["mean"], i, "o", ms=8, color=colour)
            axis.annotate(
                f"{100 * cell['mean']:.1f}",
                (cell["mean"], i),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axis.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.2)
        axis.set_xlabel("accuracy (%), bar: one std over tasks")
        percent_axis(axis)

    return svg(draw, (5.6, 1.0 + 0.45 * len(rows)), "accuracy under changed conditions")


def histogram(generated: np.ndarray, held_out: np.ndarray) -> str:
    """Distances to the nearest training adapter: generated against real new seeds."""

    def draw(figure):
        axis = figure.subplots()
        high = float(max(generated.max(), held_out.max(), 1e-6)) * 1.05
        bins = np.linspace(0, high, 31)
        for values, colour, text, fill in (
            (held_out, names.BLUE, "real, new seed", False),
            (generated, names.VERMILION, "generated", True),
        ):
            share = np.histogram(values, bins)[0] / len(values)
            axis.stairs(share, bins, color=colour, fill=fill, alpha=0.5 if fill else 1, lw=2,
                        label=text)  # fmt: skip
            axis.axvline(np.median(values), color=colour, lw=1.4, ls=(0, (4, 3)))
        axis.set_xlabel("distance to the nearest training adapter / its norm")
        axis.set_ylabel("share of adapters")
        axis.set_xlim(0, high)
        figure.legend(loc="outside upper left", ncols=2)

    return svg(draw, (5.6, 3.5), "distance to the nearest training adapter")


def steps(samplers: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy against the number of sampler steps (log axis), a line per sampler."""
    known = {
        "euler": ("o", names.VERMILION),
        "ddpm": ("s", names.BLUE),
        "heun": ("^", names.GREEN),
        "ddim": ("D", names.PURPLE),
    }

    def draw(figure):
        axis = figure.subplots()
        counts = set()
        for sampler, points in sorted(samplers.items()):
            order = sorted(points, key=int)
            x = np.asarray([int(count) for count in order])
            counts |= set(x.tolist())
            y = np.asarray([points[count]["mean"] for count in order])
            error = np.asarray([points[c]["std"] / np.sqrt(points[c]["n"]) for c in order])
            marker, colour = known.get(sampler, ("v", names.INK))
            axis.fill_between(x, y - error, y + error, color=colour, alpha=0.13, lw=0)
            axis.plot(x, y, marker=marker, color=colour, ms=6, label=sampler.upper())
        axis.set_xscale("log")
        ticks = _apart(sorted(counts))
        axis.set_xticks(ticks, [str(c) for c in ticks])
        axis.minorticks_off()
        axis.set_xlabel("sampler steps (log scale)")
        axis.set_ylabel("accuracy (%)")
        percent_axis(axis, "y")
        figure.legend(loc="outside upper left", ncols=4)

    return svg(draw, (5.6, 3.7), "accuracy against sampler steps")


def _apart(counts: list[int]) -> list[int]:
    """Ticks at least a factor 1.4 apart, so that their labels do not touch on a log axis."""
    kept: list[int] = []
    for count in counts:
        if not kept or count >= 1.4 * kept[-1]:
            kept.append(count)
    return kept


def curves(group: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> str:
    """Losses of one family against training steps; log axis where all are positive."""
    lines = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)))
    hues = (names.BLUE, names.VERMILION, names.GREEN, names.PURPLE, names.ORANGE, names.BLACK)

    def draw(figure):
        axis = figure.subplots()
        for i, (name, curve) in enumerate(sorted(group.items())):
            axis.plot(
                curve["step"],
                curve["value"],
                color=hues[i % len(hues)],
                ls=lines[i // 2 % len(lines)],
                lw=1.7,
                label=name.split("/", 1)[-1],
            )
        if all(value > 0 for curve in group.values() for value in curve["value"]):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.set_ylabel("loss")
        if len(group) > 1:
            axis.legend(loc="upper right")

    return svg(draw, (5.4, 3.7), f"loss curves of {title}")
