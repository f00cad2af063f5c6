"""Figures of `text` as a summary, a page and a plot; all words come from the figures.

A ranking of a paper, "a above b", is looked up at the largest T, each method at its tuned factor:

.. math:: d_s = \\text{normalised}_s(a) - \\text{normalised}_s(b), \\quad s = \\text{seeds}

It is called reproduced where every d_s > 0, reversed where every d_s < 0, else undecided.

Original to jlora; the rankings are those of the papers' abstracts and main tables, which were
found on other models, sizes and tasks. Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import plots

MARKS = ("<!-- merging quality -->", "<!-- /merging quality -->")
EMPTY = f"# How good merged adapters are\n\n{MARKS[0]}\n{MARKS[1]}\n"
CLAIMS = (  # above, below, who says so
    ("ties", "task_arithmetic", "TIES, 2306.01708"),
    ("dare_linear", "task_arithmetic", "DARE, 2311.03099"),
    ("dare_ties", "ties", "DARE, 2311.03099"),
    ("della", "dare_ties", "DELLA, 2406.11617"),
    ("breadcrumbs", "task_arithmetic", "Model Breadcrumbs, 2312.06795"),
    ("sce", "ties", "FuseChat, 2408.07990"),
    ("consensus", "task_arithmetic", "TALL masks, 2405.07813"),
    ("knots", "ties", "KnOTS, 2410.19735"),
    ("core_space", "knots", "Core Space, 2025"),
    ("tsv", "task_arithmetic", "TSV, 2412.00081"),
    ("iso_c", "task_arithmetic", "Iso-C, 2502.04959"),
    ("iso_cts", "iso_c", "Iso-CTS, 2502.04959"),
    ("wudi", "task_arithmetic", "WUDI, 2503.08099"),
    ("cart", "task_arithmetic", "CART, 2412.12153"),
    ("robust_merge", "task_arithmetic", "RobustMerge, 2502.17159"),
    ("do_merging", "task_arithmetic", "DO-Merging, 2505.15875"),
    ("lego", "task_arithmetic", "LoRA-LEGO, 2409.16167"),
    ("adamerging", "task_arithmetic", "AdaMerging, 2310.02575"),
)
PANELS = {
    "sums and elements": (
        *("task_arithmetic", "truncated", "magnitude", "ties", "dare_linear", "dare_ties"),
        *("della", "breadcrumbs", "sce", "consensus"),
    ),
    "spectra and spheres": (
        *("task_arithmetic", "knots", "core_space", "tsv", "iso_c", "iso_cts", "wudi", "cart"),
        *("model_stock", "multislerp"),
    ),
    "systems, factors, learned": (
        *("task_arithmetic", "robust_merge", "do_merging", "lego", "lion", "factor_mix"),
        *("peft_linear", "peft_ties", "peft_dare_linear", "adamerging", "coefficients", "lorahub"),
    ),
}
VERDICTS = {"reproduced": "reproduced", "reversed": "the other way round", "undecided": "undecided"}


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """{"normalised", "accuracy": {setting: {method: {"default"|"tuned": cell}}}, "base", "claims"}.

    A cell is {"mean", "std", "seeds": [..]}, the std with n - 1, 0 for one seed.
    """
    out: dict[str, Any] = {"normalised": {}, "accuracy": {}, "base": {}}
    known = {(s["name"], str(s["seed"])): s for s in results["settings"]}
    for name, methods in results["results"].items():
        for method, seeds in methods.items():
            for kind in ("default", "tuned"):
                raw, norm = [], []
                for seed, cell in sorted(seeds.items()):
                    single = singles(results, known[name, seed])
                    raw.append(np.mean([cell[kind][t] for t in single]))
                    norm.append(np.mean([cell[kind][t] / single[t] for t in single]))
                for part, values in (("accuracy", raw), ("normalised", norm)):
                    place = out[part].setdefault(name, {}).setdefault(method, {})
                    place[kind] = _cell(values)
        rows = [known[name, s] for s in sorted(next(iter(methods.values())))]
        base = [
            np.mean([results["base"][t] / a for t, a in singles(results, s).items()]) for s in rows
        ]
        out["base"][name] = _cell(base)
        if name == largest(results):
            multi = [np.mean([results["multitask"][t] / a for t, a in singles(results, s).items()])
                     for s in rows]  # fmt: skip
            out["multitask"] = _cell(multi)
    out["claims"] = claims(out["normalised"][largest(results)])
    return out


def singles(results: Mapping[str, Any], setting: Mapping[str, Any]) -> dict[str, float]:
    """{task: test accuracy} of the adapters that a setting merges, each on its own task."""
    return {t: results["single"][f"{t}/{setting['seed']}/{r}"]
            for t, r in zip(setting["tasks"], setting["ranks"], strict=True)}  # fmt: skip


def largest(results: Mapping[str, Any]) -> str:
    """The setting of the most adapters of one rank."""
    return max((n for n in results["results"] if n.isdigit()), key=int)


def claims(top: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Verdicts on the papers' rankings, from the cells of one setting."""
    out = []
    for above, below, paper in CLAIMS:
        if above in top and below in top:
            both = (top[m]["tuned"]["seeds"] for m in (above, below))
            d = [a - b for a, b in zip(*both, strict=True)]
            verdict = "undecided"
            if all(x > 0 for x in d) or all(x < 0 for x in d):
                verdict = "reproduced" if d[0] > 0 else "reversed"
            out.append({"above": above, "below": below, "paper": paper, "verdict": verdict,
                        **_cell(d)})  # fmt: skip
    return out


def about_texts(results: Mapping[str, Any]) -> str:
    """The sentence on base, adapters, tasks and head of the text setting."""
    config = results["config"]
    return (
        f"Base `{config['base']}`, adapters on `{config['sites']}` of the upper {config['layers']}"
        f" layers, {len(results['tasks'])} tasks of two classes, {results['seeds']} training seeds,"
        f" {config['zoo_steps']} steps each; frozen head: the embedded label texts."
    )


def render(
    results: Mapping[str, Any], summary: Mapping[str, Any], command: str,
    about: str | None = None, figure: str = "merging_quality",
) -> str:  # fmt: skip
    """The generated part of the page; `about`: what is merged, `figure`: name of the plot."""
    plan, top = results["plan"], largest(results)
    number = len(results["tasks"])
    lines = [
        f"Made by `{command}`.",
        "",
        f"{about or about_texts(results)} Rank"
        f" {plan['ranks'][0]}; mixed: every second adapter has rank {plan['ranks'][1]}."
        f" {plan['test_rows']} test rows a task. Seed s merges other tasks than seed 0 where T <"
        f" {number}.",
        "",
        "Normalised accuracy in % (accuracy of the merge / accuracy of the task's own adapter, mean"
        " over the merged tasks), mean ± std over seeds. Default: weights 1/T. Tuned: the merged"
        f" delta times the factor that is best on {plan['validation_rows']} validation rows a task."
        " Sorted by the tuned figure at the largest T; equal methods are listed once.",
        "",
    ]
    lines += table(results, summary, top)
    lines += ["", f"![Normalised accuracy against T](results/{figure}.svg)", ""]
    lines += per_task(results, summary, top)
    lines += ["", *paragraph(results, summary, top)]
    return "\n".join(lines)


def table(results: Mapping[str, Any], summary: Mapping[str, Any], top: str) -> list[str]:
    """One row a method, two columns a setting."""
    names = list(results["results"])
    heads = [f"T = {n}, {k}" for n in names for k in ("default", "tuned")]
    lines = ["| merge | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    norm = summary["normalised"]
    base = " | ".join(f"{_show(summary['base'][n])} | " for n in names)
    lines.append(f"| *base model, no adapter* | {base} |")
    if "multitask" in summary:
        cells = [f"{_show(summary['multitask'])} | " if n == top else " | " for n in names]
        lines.append("| *one adapter trained on all tasks (one run)* | " + " | ".join(cells) + " |")
    methods = {m for n in names for m in norm[n]}
    order = sorted(methods, key=lambda m: (-norm[top].get(m, {"tuned": {"mean": -1.0}})["tuned"]
                                           ["mean"], m))  # fmt: skip
    for method in order:
        cells = []
        for name in names:
            got = norm[name].get(method)
            cells += [_show(got[k]) if got else "" for k in ("default", "tuned")]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return lines


def per_task(results: Mapping[str, Any], summary: Mapping[str, Any], top: str) -> list[str]:
    """Accuracies of each task at the largest T."""
    norm = summary["normalised"][top]
    best = sorted(norm, key=lambda m: -norm[m]["tuned"]["mean"])[:3]
    shown = [*best, *(m for m in ("task_arithmetic",) if m not in best and m in norm)]
    rank, seeds = results["plan"]["ranks"][0], range(results["seeds"])
    lines = [
        f"Test accuracy in % of each task at T = {top}, tuned, mean ± std over seeds:", "",
        "| task | base | its own adapter | " + " | ".join(f"`{m}`" for m in shown) + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]  # fmt: skip
    for task in results["tasks"]:
        own = [results["single"][f"{task}/{s}/{rank}"] for s in seeds]
        cells = [f"{100 * results['base'][task]:.1f}", _show(_cell(own))]
        for method in shown:
            got = results["results"][top][method]
            cells.append(_show(_cell([got[str(s)]["tuned"][task] for s in seeds])))
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return lines


def paragraph(results: Mapping[str, Any], summary: Mapping[str, Any], top: str) -> list[str]:
    """What the figures say about the papers' rankings."""
    norm, seeds = summary["normalised"][top], results["seeds"]
    order = sorted(norm, key=lambda m: -norm[m]["tuned"]["mean"])
    first, base = order[0], norm.get("task_arithmetic")
    lines = [
        f"At T = {top} the best tuned merge is `{first}` ({_show(norm[first]['tuned'])} % of the"
        f" single adapters; the base alone: {_show(summary['base'][top])} %)."
    ]
    if base is not None:
        lines[0] += (
            f" The weighted sum has {_show(base['default'])} % at weights 1/T and"
            f" {_show(base['tuned'])} % tuned."
        )
    tests = len(results["tasks"]) * results["plan"]["test_rows"]
    mean = summary["accuracy"][top][first]["tuned"]["mean"]
    noise = 100 * float(np.sqrt(mean * (1 - mean) / tests))
    kinds = {v: [f"`{c['above']}` over `{c['below']}`" for c in summary["claims"]
                 if c["verdict"] == v] for v in VERDICTS}  # fmt: skip
    lines += [
        "",
        f"Rankings of papers at T = {top}, tuned: reproduced where the difference of normalised"
        f" accuracy is positive for each of {seeds} seeds, the other way round where it is negative"
        f" for each, else undecided. All seeds share the {tests} test rows, which alone move an"
        f" accuracy by {noise:.1f} points (one standard error; less in a difference of two merges),"
        f" so of {len(summary['claims'])} rankings some may fall to either side by chance.",
        "",
        *(
            f"- {words[0].upper() + words[1:]}: {', '.join(kinds[v]) or 'none'}."
            for v, words in VERDICTS.items()
        ),
        "",
        "| paper | ranking | difference (points) | here |",
        "|---|---|---|---|",
    ]
    for claim in summary["claims"]:
        lines.append(
            f"| {claim['paper']} | `{claim['above']}` above `{claim['below']}` |"
            f" {100 * claim['mean']:+.1f} ± {100 * claim['std']:.1f} |"
            f" {VERDICTS[claim['verdict']]} |"
        )
    return lines


def plot(results: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Tuned normalised accuracy against T as SVG, a panel a family of methods."""
    sizes = sorted((n for n in results["results"] if n.isdigit()), key=int)
    norm = summary["normalised"]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for axis, (title, methods) in zip(axes, PANELS.items(), strict=True):
            _lines(axis, methods, sizes, norm)
            base = [summary["base"][n]["mean"] for n in sizes]
            axis.plot(range(len(sizes)), base, color="black", ls=":", label="base model")
            axis.set(title=title, xlabel="adapters merged, T")
            axis.set_xticks(range(len(sizes)), sizes)
            axis.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
            plots.percent_axis(axis, "y")
        axes[0].set_ylabel("normalised accuracy (%), tuned")

    return plots.svg(draw, (12.0, 5.2), "Normalised accuracy of merges against their number")


def _lines(
    axis: Any, methods: Sequence[str], sizes: Sequence[str], norm: Mapping[str, Any]
) -> None:
    shapes = "osv^Dpx+<>*h"
    for k, method in enumerate(m for m in methods if all(m in norm[n] for n in sizes)):
        cells = [norm[n][method]["tuned"] for n in sizes]
        grey = method == "task_arithmetic"
        axis.errorbar(
            np.arange(len(sizes)) + 0.015 * (k - len(methods) / 2),
            [c["mean"] for c in cells], [c["std"] for c in cells],
            marker=shapes[k % len(shapes)], ms=4, lw=2.2 if grey else 1.1, elinewidth=0.6,
            color="grey" if grey else f"C{(k - 1) % 10}", label=method,
        )  # fmt: skip


def between(page: str, text: str) -> str:
    """The page with `text` between its marks. Raises ValueError where they are missing."""
    if page.count(MARKS[0]) != 1 or page.count(MARKS[1]) != 1:
        raise ValueError(f"page: expected the marks {MARKS[0]} and {MARKS[1]} once each")
    head, tail = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    return f"{head}{MARKS[0]}\n{text}\n{MARKS[1]}{tail}"


def _cell(values: Sequence[Any]) -> dict[str, Any]:
    x = np.asarray(values, np.float64)
    std = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": std, "seeds": [float(v) for v in x]}


def _show(cell: Mapping[str, Any]) -> str:
    return f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}"
