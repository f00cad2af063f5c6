"""Maps of adapters as inline SVG: PCA, t-SNE and trajectories, and the confusion matrix."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

from experiments.report import arrays as plot_arrays
from experiments.report import names
from experiments.report.plots import percent_axis, svg

MARKERS = {
    plot_arrays.TRAINED: ("o", "trained (real)"),
    plot_arrays.HELD_OUT: ("D", "new seed (real)"),
    plot_arrays.GENERATED: ("X", "generated"),
}
FULL_LABELS = 14  # more tasks than this are numbered, not named
HIGHLIGHT = len(names.TASK_COLOURS)


def confusion(labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Heat map of the nearest-soup confusion; many tasks are numbered as in the task table."""
    size = len(labels)
    named = size <= FULL_LABELS

    def draw(figure):
        axis = figure.subplots()
        image = axis.pcolormesh(
            np.arange(size + 1) + 0.5,
            np.arange(size + 1) + 0.5,
            np.ma.masked_equal(np.asarray(matrix), 0),  # never: white; once: already visible
            cmap=ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 128))),
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        axis.set(aspect="equal", ylim=(size + 0.5, 0.5))
        axis.set_xlabel("task of the nearest soup")
        axis.set_ylabel("task asked for")
        axis.grid(False)
        if named:
            places = np.arange(1, size + 1)
            axis.set_xticks(places)
            axis.set_yticks(places, [f"{_clip(name, 30)}  {i}" for i, name in enumerate(labels, 1)])
        else:
            step = 5 if size <= 80 else 10
            places = [1, *range(step, size + 1, step)]
            axis.set_xticks(places)
            axis.set_yticks(places)
        figure.colorbar(image, ax=axis, shrink=0.7, label="share of samples")

    return svg(
        draw,
        (6.4, 2.2 + 0.2 * size) if named else (5.8, 4.9),
        "confusion matrix of generated adapters",
    )


def _shown_tasks(task: np.ndarray, kind: np.ndarray) -> list[int]:
    """Up to eight tasks that have generated adapters, spread over the list: those get colours."""
    candidates = np.unique(task[kind == plot_arrays.GENERATED])
    if candidates.size == 0:
        candidates = np.unique(task)
    pick = np.linspace(0, len(candidates) - 1, min(HIGHLIGHT, len(candidates))).round().astype(int)
    return [int(candidates[i]) for i in np.unique(pick)]


def scatter(
    points: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    axes_names: tuple[str, str],
    alt: str,
    paths: np.ndarray | None = None,
) -> str:
    """Adapters in the plane: shape says real or generated, colour says the task (up to eight).

    Args:
      points: [N, 2]. arrays: group adapters (and trajectory_task where ``paths`` is given).
      paths: [J, K, 2] denoising trajectories drawn from noise (square) to adapter (star).
    """
    task, kind = arrays["task"], arrays["kind"]
    runs = [int(t) for t in arrays.get("trajectory_task", ())]  # the same tasks in every plot
    shown = list(dict.fromkeys([*runs, *_shown_tasks(task, kind)]))[:HIGHLIGHT]
    colours = dict(zip(shown, names.TASK_COLOURS, strict=False))

    def draw(figure):
        axis = figure.subplots()
        faint = 0.35 if paths is None else 0.25
        for value, (marker, _) in MARKERS.items():
            rest = (kind == value) & ~np.isin(task, shown)
            filled = value == plot_arrays.GENERATED
            axis.scatter(
                *points[rest].T,
                marker=marker,
                s=16,
                facecolors=names.LIGHT if filled else "none",
                edgecolors="none" if filled else names.LIGHT,
                lw=0.9,
                zorder=1,
                rasterized=True,
            )
            for number, colour in colours.items():
                mine = (kind == value) & (task == number)
                axis.scatter(
                    *points[mine].T,
                    marker=marker,
                    s=44 if filled else 40,
                    facecolors=colour if filled else "none",
                    edgecolors="white" if filled else colour,
                    lw=0.5 if filled else 1.4,
                    alpha=1 if paths is None else faint + 0.3,
                    zorder=3 if filled else 2,
                )
        if paths is not None:
            for run, number in zip(paths, arrays["trajectory_task"], strict=True):
                colour = colours.get(int(number), names.INK)
                axis.plot(*run.T, color=colour, lw=1.6, zorder=4)
                axis.scatter(*run.T, color=colour, s=9, zorder=4)
                axis.plot(*run[0], "s", ms=8, color=colour, mec="white", zorder=5)
                axis.plot(*run[-1], "*", ms=15, color=colour, mec="white", zorder=5)
        axis.set_xlabel(axes_names[0])
        axis.set_ylabel(axes_names[1])
        axis.tick_params(labelbottom=False, labelleft=False, length=0)
        _legend(figure, axis, kind, colours, arrays["names"], len(shown) < len(np.unique(task)),
                paths is not None)  # fmt: skip

    return svg(draw, (5.7, 6.1), alt)


def _legend(figure, axis, kind, colours, task_names, rest: bool, run: bool) -> None:
    """One legend of shapes above the plot, one of tasks below it."""
    shapes = []
    for value, (marker, text) in MARKERS.items():
        if (kind == value).any():
            fill = names.INK if value == plot_arrays.GENERATED else "none"
            shapes.append(
                Line2D([], [], marker=marker, ls="", mfc=fill, mec=names.INK, ms=7, label=text)
            )
    if run:
        shapes.append(
            Line2D([], [], marker="s", ls="", color=names.INK, ms=7, label="start: noise")
        )
        shapes.append(Line2D([], [], marker="*", ls="", color=names.INK, ms=11, label="end"))
    figure.legend(handles=shapes, loc="outside upper left", ncols=3, handletextpad=0.2)
    tasks = [
        Line2D([], [], color=colour, lw=5, label=_clip(str(task_names[number])))
        for number, colour in colours.items()
    ]
    if rest:
        tasks.append(Line2D([], [], color=names.LIGHT, lw=5, label="all other tasks"))
    columns = 1 if max(len(str(handle.get_label())) for handle in tasks) > 34 else 2
    figure.legend(handles=tasks, loc="outside lower left", ncols=columns, handlelength=0.9)


def _clip(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def overlap(arrays: Mapping[str, np.ndarray]) -> str:
    """Accuracy against the largest overlap of mistakes with a training adapter."""

    def draw(figure):
        axis = figure.subplots()
        for value, (marker, text) in MARKERS.items():
            mine = arrays["iou_kind"] == value
            if not mine.any():
                continue
            generated = value == plot_arrays.GENERATED
            colour = names.VERMILION if generated else names.BLUE
            axis.scatter(
                arrays["iou_max"][mine],
                arrays["iou_accuracy"][mine],
                marker=marker,
                s=30,
                facecolors=colour if generated else "none",
                edgecolors="none" if generated else colour,
                alpha=0.6,
                label=text,
            )
        axis.set_xlabel("largest overlap of mistakes with a training adapter (IoU)")
        axis.set_ylabel("accuracy (%)")
        percent_axis(axis, "y")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2)

    return svg(draw, (5.6, 3.8), "overlap of mistakes against accuracy")
