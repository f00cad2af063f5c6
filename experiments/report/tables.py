"""The tables of the report as HTML text."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments.report import names, schema


def percent(value: float, digits: int = 1) -> str:
    """0.8953 -> 89.5."""
    return f"{100 * value:.{digits}f}"


def cell(entry: Mapping[str, Any]) -> str:
    """Mean in percent with a small standard deviation where there is more than one value."""
    spread = f"<small>±{percent(entry['std'])}</small>" if entry["n"] > 1 else ""
    return f"{percent(entry['mean'])}{spread}"


def signed(value: float) -> str:
    """Points of accuracy with a sign, coloured and marked."""
    kind = "up" if value > 0 else "down" if value < 0 else ""
    return f'<span class="{kind}">{100 * value:+.1f}</span>'.replace("-", "−")


def interval(entry: Mapping[str, Any] | None, points: bool = False) -> str:
    """Estimate with its bootstrap interval; a dash where there is nothing to estimate."""
    if entry is None:
        return "–"
    ends = f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}".replace("-", "−")
    middle = signed(entry["mean"]) if points else percent(entry["mean"])
    return f"{middle}<small>{ends}</small>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "", tall=False) -> str:
    """Scrolling table; the first column is text, the others are figures. Cells are HTML."""
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows)
    shape = "scroll tall" if tall else "scroll"
    return (
        f'<div class="{shape}" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def main_table(report: Mapping[str, Any]) -> str:
    """Accuracy on seen tasks by method, with a bar and the paired difference to generated."""
    rows = []
    for key in _ordered(report["summary"], schema.SEEN_KEYS):
        total = report["summary"][key]
        pair = report["seen_paired"].get(key)
        name = (
            f"<b>{escape(names.method(key).label)}</b>"
            if key == "generated"
            else escape(names.method(key).label)
        )
        width = min(max(100 * total["mean"], 0), 100)
        colour = names.method(key).colour
        bar = f'<span class="bar"><i style="width:{width:.1f}%;background:{colour}"></i></span>'
        rows.append(
            [
                f"{name}<small>{escape(names.method(key).remark)}</small>",
                f"<b>{percent(total['mean'])}</b>{bar}",
                percent(total["std"]),
                percent(total["within"]) if "within" in total else "–",
                str(total["n"]),
                interval(pair, points=True) if pair else "–",
            ]
        )
    head = (
        "method",
        "accuracy %",
        "std over tasks",
        "std over samples",
        "tasks",
        "generated minus this<small>95 % interval</small>",
    )
    return table(head, rows, kind="main")


def task_table(report: Mapping[str, Any]) -> str:
    """Every seen task by every method, numbered as in the confusion matrix."""
    keys = _ordered(report["summary"], schema.SEEN_KEYS)
    number = {name: i + 1 for i, name in enumerate(report["confusion"]["labels"])}
    tasks = sorted(report["table"], key=lambda t: (number.get(t, 1_000_000), t))
    rows = []
    for task in tasks:
        row = report["table"][task]
        gain = row["generated"]["mean"] - row["soup"]["mean"]
        place = f'<span class="number">{number[task]}</span>' if task in number else ""
        rows.append([f"{place}{escape(task)}", *(cell(row[k]) for k in keys), signed(gain)])
    head = ["task", *(escape(names.method(k).short) for k in keys), "generated − soup"]
    return table(head, rows, kind="tasks", tall=len(rows) > 14)


def level_table(level: Mapping[str, Any]) -> str:
    """One held-out level by method: accuracy, gap recovered, paired difference."""
    rows = []
    keys = _ordered(level["accuracy"], schema.UNSEEN_KEYS)
    for key in sorted(keys, key=lambda k: -level["accuracy"][k]["mean"]):
        name = escape(names.method(key).label)
        name = f"<b>{name}</b>" if key == "generated" else name
        total = level["accuracy"][key]
        gap = level["gap_recovered"].get(key) if key not in ("base", "trained") else None
        pair = level["paired"].get(key)
        rows.append(
            [
                f"{name}<small>{escape(names.method(key).remark)}</small>",
                cell(total),
                interval(gap),
                interval(pair, points=True) if pair else "–",
            ]
        )
    head = (
        "method",
        "accuracy %<small>± std over tasks</small>",
        "gap recovered %<small>95 % interval</small>",
        "generated minus this<small>95 % interval</small>",
    )
    return table(head, rows, kind="main")


def level_tasks(level: Mapping[str, Any]) -> str:
    """Every task of a held-out level by every method."""
    keys = _ordered(level["accuracy"], schema.UNSEEN_KEYS)
    rows = []
    for task, row in sorted(level["table"].items()):
        dropped = " <small>gap too small: not in the gap figures</small>"
        name = escape(task) + (dropped if task in level["dropped"] else "")
        rows.append([name, *(cell(row[k]) for k in keys)])
    head = ["task", *(escape(names.method(k).short) for k in keys)]
    return table(head, rows, kind="tasks", tall=len(rows) > 14)


def mistakes(report: Mapping[str, Any], most: int = 10) -> str:
    """The most frequent wrong nearest soups; empty text where there are none."""
    labels, matrix = report["confusion"]["labels"], report["confusion"]["matrix"]
    wrong = [
        (share, labels[i], labels[j])
        for i, row in enumerate(matrix)
        for j, share in enumerate(row)
        if i != j and share > 0
    ]
    wrong.sort(key=lambda item: (-item[0], item[1], item[2]))
    rows = [[escape(a), escape(b), percent(share, 0)] for share, a, b in wrong[:most]]
    return table(("asked for", "nearest soup", "% of samples"), rows, kind="pairs") if rows else ""


def settings(mapping: Mapping[str, Any], skip: Sequence[str] = ()) -> str:
    """Names and values, sorted."""
    rows = [
        [f"<code>{escape(key)}</code>", f"<code>{escape(_text(value))}</code>"]
        for key, value in sorted(mapping.items())
        if key not in skip
    ]
    return table(("name", "value"), rows, kind="settings", tall=len(rows) > 14)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _ordered(have: Mapping[str, Any], order: Sequence[str]) -> list[str]:
    return [key for key in order if key in have] + sorted(k for k in have if k not in order)
