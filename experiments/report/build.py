"""From accuracies per task to a complete report: cells, summaries, gaps, paired intervals, claims.

.. math:: \\text{gap recovered}(x) =
    \\frac{\\sum_t (x_t - \\text{base}_t)}{\\sum_t (\\text{trained}_t - \\text{base}_t)}

over the tasks whose gap (trained - base) is at least ``MIN_GAP``; the others are listed as dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from experiments.report import bootstrap, claims, names, schema

MIN_GAP = 0.03  # 3 points: below it a share of the gap is noise

Table = Mapping[str, Mapping[str, ArrayLike]]  # task -> method -> accuracies


def cell(values: Any, path: str = "cell", keep: bool = True) -> dict[str, Any]:
    """{mean, std, n, values} of a list of figures (one number counts as a list of one).

    Args:
      values: accuracies of samples, seeds or tasks; any array-like.
      path: where it stands in the report, for errors.
      keep: keep the single values.

    Raises:
      ReportError: no values, or one that is not finite.
    """
    array = np.atleast_1d(np.asarray(values, np.float64)).ravel()
    if array.size == 0:
        raise schema.ReportError(f"{path}: no values")
    if not np.isfinite(array).all():
        bad = int(np.argmin(np.isfinite(array)))
        raise schema.ReportError(f"{path}[{bad}]: {array[bad]} is not a figure")
    std = float(array.std(ddof=1)) if array.size > 1 else 0.0
    out: dict[str, Any] = {"mean": float(array.mean()), "std": std, "n": int(array.size)}
    return out | ({"values": array.tolist()} if keep else {})


def table(tasks: Table, keys: Sequence[str], path: str) -> dict[str, dict[str, Any]]:
    """{task: {method: cell}}; every task must have every method of ``keys``."""
    for task, row in tasks.items():
        missing = [key for key in keys if key not in row]
        if missing:
            raise schema.ReportError(f"{path}.{task}: missing {', '.join(missing)}")
    return {
        task: {key: cell(values, f"{path}.{task}.{key}") for key, values in row.items()}
        for task, row in tasks.items()
    }


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{method: {mean, std, n, within}} over tasks, of the methods that every task has.

    mean and std are over the tasks' means (each task weighs the same), ``within`` is the mean over
    tasks of the std over samples or seeds.
    """
    names = list(next(iter(rows.values())))
    shared = [key for key in names if all(key in row for row in rows.values())]
    return {
        key: cell(_means(rows, key), key, keep=False)
        | {"within": float(np.mean([row[key]["std"] for row in rows.values()]))}
        for key in shared
    }


def _means(rows: Mapping[str, Mapping[str, Any]], key: str) -> np.ndarray:
    return np.asarray([row[key]["mean"] for row in rows.values()])


def level(tasks: Table, name: str, seed: int = 0) -> dict[str, Any]:
    """One held-out level: per-task table, accuracies, gap recovered, paired differences.

    Args:
      tasks: {task: {method: accuracies}} with all of ``schema.required(name)``; methods that only
        some tasks have are shown task by task, but not summed up.
      name: one of ``schema.LEVELS``. seed: of the bootstrap.

    Returns:
      {table, accuracy, gap_recovered {method: interval or None}, dropped [tasks], paired
      {baseline: interval of generated - baseline in accuracy}, best_rival {method, accuracy,
      paired}, layered_best_rival: the same of the layered discriminant}. The best rival is the one
      of the highest mean on these very tasks, which favours it.
    """
    rows = table(tasks, schema.required(name), f"report.unseen.{name}.table")
    totals = summary(rows)
    methods = [key for key in totals if key not in ("base", "trained")]
    base = _means(rows, "base")
    trained = _means(rows, "trained") if "trained" in totals else base
    kept = trained - base >= MIN_GAP
    gaps: dict[str, Any] = dict.fromkeys(methods)
    if kept.any():
        for key in methods:
            gained = (_means(rows, key) - base)[kept]
            gaps[key] = bootstrap.ratio(gained, (trained - base)[kept], seed=seed)
    generated = _means(rows, "generated")

    def against(method: str) -> dict[str, Any]:
        rivals = [k for k in names.rivals(names.HELD_OUT) if k in totals and k != method]
        best = max(rivals, key=lambda key: totals[key]["mean"])
        difference = bootstrap.paired(_means(rows, method), _means(rows, best), seed=seed)
        return {"method": best, "accuracy": totals[best]["mean"], "paired": difference}

    return {
        "table": rows,
        "accuracy": totals,
        "gap_recovered": gaps,
        "dropped": [task for task, keep in zip(rows, kept, strict=True) if not keep],
        "paired": {
            key: bootstrap.paired(generated, _means(rows, key), seed=seed)
            for key in methods
            if key != "generated"
        },
        "best_rival": against("generated"),
    } | ({"layered_best_rival": against("layered")} if "layered" in totals else {})


def build(
    *,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    seen: Table,
    confusion_labels: Sequence[str],
    confusion_matrix: Any,
    confusion_diagonal: float,
    condition_controls: Mapping[str, ArrayLike],
    novelty_ratio: float,
    diversity_ratio: float,
    unseen: Mapping[str, Table],
    steps: Mapping[str, Mapping[int, ArrayLike]],
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    times: Mapping[str, float],
    audit: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    more_steps: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The whole report, validated, ready for `schema.write`.

    Args:
      config: every setting of the run, and ``command`` (the command line, a string).
      environment: versions, platform, number of cores; nothing that changes between two runs.
      seen: {task: {method: accuracies}} with all of ``schema.SEEN_KEYS``; one accuracy per sample
        (generated, pdiff) or training seed (trained), a single one for base, soup, mean_adapter.
      confusion_labels: names of the seen tasks, in the order of the matrix.
      confusion_matrix: [tasks, tasks], rows are fractions (`audit.nearest_soup_confusion`).
      confusion_diagonal: fraction of generated adapters nearest to their own soup.
      condition_controls: {shuffled | null | paraphrased: accuracies, one per task}; more may be
        given.
      novelty_ratio, diversity_ratio: of `audit`.
      unseen: {level: {task: {method: accuracies}}} with all of ``schema.required(level)``; levels
        without tasks are left out.
      steps: {sampler: {number of steps: accuracies, one per task in the same order everywhere}}.
      curves: {name: (steps, values)} of the losses; names with a common prefix before '/' share a
        plot.
      times: seconds, by stage; the only part that may differ between two equal runs.
      audit: further scalars (soup distance, affine residual, effective ranks, ...).
      notes: plain sentences shown under the claims: what was tried, what to know.
      more_steps: as `more_steps.section` gives it; None: not measured.
      seed: of the bootstrap.

    Returns:
      dict as `schema` describes it.

    Raises:
      ReportError: anything missing or not finite, by path.
    """
    if not seen:
        raise schema.ReportError("report.table: no tasks")
    rows = table(seen, schema.SEEN_KEYS, "report.table")
    generated = _means(rows, "generated")
    totals = summary(rows)
    report: dict[str, Any] = {
        "version": schema.VERSION,
        "config": dict(config),
        "environment": dict(environment),
        "table": rows,
        "summary": totals,
        "seen_paired": {
            key: bootstrap.paired(generated, _means(rows, key), seed=seed)
            for key in totals
            if key != "generated"
        },
        "confusion": {"labels": list(confusion_labels), "matrix": confusion_matrix},
        "confusion_diagonal": confusion_diagonal,
        "condition_controls": {
            key: cell(values, f"report.condition_controls.{key}")
            for key, values in condition_controls.items()
        },
        "novelty_ratio": novelty_ratio,
        "diversity_ratio": diversity_ratio,
        "unseen": {name: level(tasks, name, seed) for name, tasks in unseen.items() if tasks},
        "steps": {
            sampler: {
                str(count): cell(values, f"report.steps.{sampler}.{count}")
                for count, values in points.items()
            }
            for sampler, points in steps.items()
        },
        "curves": {name: {"step": step, "value": value} for name, (step, value) in curves.items()},
        "audit": dict(audit or {}),
        "notes": list(notes),
        "times": dict(times),
    } | ({"more_steps": dict(more_steps)} if more_steps else {})
    report = schema.plain(report)
    report["claims"] = schema.plain(claims.check(report, seed=seed), "report.claims")
    schema.validate(report)
    return report
