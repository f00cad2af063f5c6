"""report.html: one self-contained page from report.json and arrays.npz.

    python -m experiments.report.html --json report.json --npz arrays.npz --out report.html

Equal input gives equal bytes. What a run did not measure is said so in its place.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import arrays as plot_arrays
from experiments.report import maps, more_steps, names, plots, schema, tables, words
from experiments.report.page import PAGE


def render(report: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The page as text.

    Args:
      report: a valid report. arrays: as `arrays.check` returns them; may be empty.
    """
    report = json.loads(schema.dumps(report))  # validated, and in one order whatever its source
    sections = (
        ("summary", "Summary", _summary(report)),
        ("unseen", "Tasks it never saw", _unseen(report)),
        ("seen", "Seen tasks", _seen(report)),
        ("condition", "Does it obey the condition?", _condition(report)),
        ("new", "New, or memorised?", _new(report, arrays)),
        ("more", "As a start of training", _more(report)),
        ("steps", "Sampler steps", _steps(report)),
        ("training", "Training", _training(report)),
        ("settings", "Settings", _settings(report)),
    )
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>\n{text}</section>\n'
        for name, title, text in sections
    )
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    config = report["config"]
    facts = " · ".join(
        escape(f"{key} {config[key]}") for key in ("base", "tasks", "head", "rank") if key in config
    )
    return PAGE.substitute(facts=facts, links=links, body=body)


def figure(svg: str, caption: str, wide: bool = False) -> str:
    """A plot with its caption (HTML)."""
    kind = "wide" if wide else ""
    return (
        f'<figure class="{kind}"><div class="plot" tabindex="0">{svg}</div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _grid(*figures: str, small: bool = False) -> str:
    kind = "figures three" if small else "figures"
    return f'<div class="{kind}">{"".join(figures)}</div>\n'


def _prose(text: str) -> str:
    """Escaped; a figure and its percent sign stay on one line."""
    return escape(text).replace(" %", "\u00a0%")


def _missing(what: str) -> str:
    return f'<p class="missing">Not measured in this run: {what}.</p>\n'


def _claim(claim: dict[str, Any]) -> str:
    kind, mark = {
        schema.HOLDS: ("holds", "✓"),
        schema.FAILS: ("fails", "✗"),
        schema.TOO_FEW: ("open", "○"),
    }[claim["verdict"]]
    word = f"{mark} {claim['verdict']}"
    title: str = names.CLAIMS.get(claim["name"]) or claim["name"]
    return (
        f'<li class="{kind}"><span class="verdict">{word}</span><b>{escape(title)}</b>'
        f"<p>{_prose(claim['text'])}</p></li>\n"
    )


def _summary(report) -> str:
    lead = "".join(f"<p>{_prose(text)}</p>" for text in words.lead(report))
    counts = words.verdicts(report)
    claims = "".join(map(_claim, report["claims"]))
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    notes = f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""
    tiles = [
        ("seen tasks, generated", tables.percent(report["summary"]["generated"]["mean"]) + " %"),
        *(
            (
                f"gap recovered, {names.LEVELS[level]}",
                tables.percent(gap["mean"]) + " %",
            )
            for level in names.LEVELS
            if level in report["unseen"]
            and (gap := report["unseen"][level]["gap_recovered"]["generated"]) is not None
        ),
        ("confusion diagonal", tables.percent(report["confusion_diagonal"]) + " %"),
        ("novelty ratio", f"{report['novelty_ratio']:.2f}"),
        ("diversity ratio", f"{report['diversity_ratio']:.2f}"),
    ]
    cards = "".join(
        f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in tiles
    )
    return (
        f'<div class="lead">{lead}</div><div class="tiles">{cards}</div>'
        f"<h3>What must hold: {counts}</h3>"
        "<p>The targets are set for the full run with the anonymous head; smaller runs are held to "
        f'the same rule.</p><ul class="claims">{claims}</ul>{notes}'
        f"<h3>Accuracy on seen tasks</h3>{tables.main_table(report)}"
    )


def _unseen(report) -> str:
    levels = [level for level in names.LEVELS if level in report["unseen"]]
    if not levels:
        return _missing("there are no held-out tasks")
    text = (
        "<p>Gap recovered is the share of what training would gain over the base model: 0 is no "
        "better than no adapter, 100 as good as training on the task. Rivals know no more of a "
        "task than the generator: the K texts per class of its condition (nearest class mean, "
        "neighbours, logistic regression, LoRA trained on them, their discriminant as an adapter),"
        " or the adapters of seen tasks (weighted sums, the multi-task adapter). The best rival is "
        "chosen on these very tasks, which favours it. Intervals are a bootstrap over tasks; tasks "
        "that share labels are not independent, so true uncertainty is somewhat larger.</p>"
    )
    measured = [k for k in levels if any(report["unseen"][k]["gap_recovered"].values())]
    if measured:
        svg = plots.gaps(report["unseen"], measured, names.gap_methods())
        caption = "Gap recovered with 95 % intervals. Dashed: base (0) and trained (100)."
        text += figure(svg, caption, wide=len(measured) > 1)
    pictures = []
    for level in levels:
        entry = report["unseen"][level]
        best = entry.get("best_rival", {}).get("method", "ridge")
        if best in entry["accuracy"]:
            alt = f"{level}: generated against {best}"
            svg = plots.methods_scatter(entry["table"], best, "generated", alt, size=4.1)
            caption = (
                f"{names.level(level)}: a dot per task, against the best rival; above the line the"
                " generator wins."
            )
            pictures.append(figure(svg, caption))
    text += _grid(*pictures, small=True) if pictures else ""
    for level in levels:
        entry = report["unseen"][level]
        count = len(entry["table"])
        text += f"<h3>{names.level(level)} ({count} task{'s' if count > 1 else ''})</h3>"
        text += f"<p>Verdict: {_prose(words.against_best(entry))}.</p>"
        text += tables.level_table(entry)
        text += f"<details><summary>Every task</summary>{tables.level_tasks(entry)}</details>"
    return text


def _seen(report) -> str:
    svg = plots.methods_scatter(report["table"], "soup", "generated", "generated against soup")
    other = plots.methods_scatter(
        report["table"], "trained", "generated", "generated against trained"
    )
    return (
        _grid(
            figure(svg, "A dot per task: generated against the soup of its trained adapters."),
            figure(other, "A dot per task: generated against single trained adapters (mean)."),
        )
        + f"<p>All {len(report['table'])} tasks, accuracy in percent ± one standard deviation over "
        "samples or seeds.</p>" + tables.task_table(report)
    )


def _condition(report) -> str:
    total, control = report["summary"], report["condition_controls"]
    rows = [(names.CONTROLS["correct"], total["generated"], names.VERMILION)]
    for key in [k for k in names.CONTROLS if k in control] + sorted(
        set(control) - set(names.CONTROLS)
    ):
        rows.append((names.CONTROLS.get(key, key), control[key], names.ORANGE))
    rows.append((names.method("mean_adapter").label, total["mean_adapter"], names.GREY))
    rows.append((names.method("base").label, total["base"], names.GREY))
    labels, matrix = report["confusion"]["labels"], report["confusion"]["matrix"]
    numbered = " Tasks are numbered as in the table of seen tasks." * (
        len(labels) > maps.FULL_LABELS
    )
    wrong = tables.mistakes(report)
    wrong = f"<h3>Most frequent wrong neighbours</h3>{wrong}" if wrong else ""
    return (
        f"<p>{_prose(words.condition(report))}</p>"
        + _grid(
            figure(
                maps.confusion(labels, matrix),
                f"Which task's soup is a generated adapter closest to? On the diagonal: "
                f"{tables.percent(report['confusion_diagonal'])} %.{numbered}",
            ),
            figure(plots.controls(rows), "Accuracy on seen tasks when the condition is changed."),
        )
        + wrong
    )


def _new(report, arrays) -> str:
    text = f"<p>{escape(words.novelty(report))}</p>"
    pictures = []
    if "nn_generated" in arrays:
        svg = plots.histogram(arrays["nn_generated"], arrays["nn_held_out"])
        pictures.append(
            figure(svg, "Left of the real new seeds: closer to memorised. Dashed: medians.")
        )
    else:
        text += _missing("distances to the nearest training adapter")
    if "iou_max" in arrays:
        caption = "Adapters that make the mistakes of a training adapter are its replicas."
        pictures.append(figure(maps.overlap(arrays), caption))
    if report["audit"]:
        text += f"<h3>Audit figures</h3>{tables.settings(report['audit'])}"
    text += _grid(*pictures) if pictures else ""
    if "gram" not in arrays:
        return text + _missing("PCA and t-SNE of adapters, denoising trajectories")
    flat = plot_arrays.pca(arrays)
    first, second = (f"PC {i + 1} ({100 * flat.explained[i]:.1f} % of variance)" for i in (0, 1))
    axes = (first, second)
    caption = (
        "Hollow: real, filled: generated. Up to eight tasks are coloured, the others grey. "
        "Distances are between weight changes (deltas), not factors."
    )
    svg = maps.scatter(flat.points, arrays, axes, "PCA of adapters")
    pictures = [figure(svg, f"PCA, fitted on trained adapters. {caption}")]
    if len(arrays["gram"]) >= 10:
        embedded = plot_arrays.tsne(arrays, flat.points)
        svg = maps.scatter(embedded, arrays, ("t-SNE 1", "t-SNE 2"), "t-SNE of adapters")
        pictures.append(figure(svg, "t-SNE. Near points are alike; far distances mean nothing."))
    if flat.paths is None:
        text += _missing("denoising trajectories")
    else:
        svg = maps.scatter(flat.points, arrays, axes, "denoising trajectories", flat.paths)
        caption = "Denoising: from noise (square) to adapter (star), each step decoded, in the PCA."
        return text + _grid(*pictures) + figure(svg, caption)
    return text + _grid(*pictures)


def _more(report) -> str:
    if "more_steps" not in report:
        return _missing("training from generated, mean and zero starts")
    curves = report["more_steps"]
    text = (
        "<p>An adapter of every held-out task, trained on all its texts from three starts, with the"
        " zoo's recipe over the largest number of steps. A start reaches training where its mean is"
        " at most a point below that of the trained adapters.</p>"
    )
    caption = "Mean accuracy after k more steps. Lines: what training from scratch reached."
    text += figure(more_steps.plot(curves), caption, wide=len(curves["levels"]) > 1)
    for level in curves["levels"]:
        said = _prose(f"Here {more_steps.sentence(curves, level)}.")
        text += f"<h3>{names.level(level)}</h3><p>{said}</p>{more_steps.table(curves, level)}"
    return text


def _steps(report) -> str:
    if not report["steps"]:
        return _missing("accuracy against sampler steps")
    caption = "Mean accuracy over seen tasks; band: one standard error over tasks."
    return figure(plots.steps(report["steps"]), caption)


def _training(report) -> str:
    if not report["curves"]:
        return _missing("loss curves")
    groups: dict[str, dict[str, Any]] = {}
    for name, curve in sorted(report["curves"].items()):
        groups.setdefault(name.split("/", 1)[0], {})[name] = curve
    return _grid(
        *(
            figure(plots.curves(group, title), escape(f"Training loss: {title}."))
            for title, group in groups.items()
        )
    )


def _settings(report) -> str:
    command = report["config"].get("command")
    shown = f"<pre>{escape(str(command))}</pre>" if command else ""
    return (
        shown
        + "<h3>Settings</h3>"
        + tables.settings(report["config"], skip=("command",))
        + "<h3>Environment</h3>"
        + tables.settings(report["environment"])
        + "<h3>Seconds by stage</h3>"
        + tables.settings(report["times"])
    )


def write(path: Path | str, report: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Renders and writes the page through a temp file and a rename."""
    path = Path(path)
    text = render(report, arrays)
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(text, encoding="utf-8")
    os.replace(temp, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report.html")
    parser.add_argument("--json", required=True, help="report.json to show")
    parser.add_argument(
        "--npz", help="arrays.npz with plot data; without it those plots are left out"
    )
    parser.add_argument("--out", required=True, help="page to write")
    options = parser.parse_args(argv)
    try:
        report = schema.read(options.json)
        write(options.out, report, plot_arrays.load(options.npz) if options.npz else {})
    except (schema.ReportError, OSError) as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
