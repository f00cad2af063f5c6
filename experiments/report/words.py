"""Plain sentences about a report: the same for every run, filled with its figures."""

from collections.abc import Mapping
from typing import Any

from experiments.report import claims, names, schema

_VERB = {
    schema.HOLDS: "hold",
    schema.FAILS: "do not hold",
    schema.TOO_FEW: "had too few tasks to say",
}


def _p(value: float) -> str:
    return f"{100 * value:.1f} %"


def lead(report: Mapping[str, Any]) -> list[str]:
    """Three or four sentences that say what came out, the bad with the good."""
    total = report["summary"]
    generated, soup, base = (total[key]["mean"] for key in ("generated", "soup", "base"))
    count = total["generated"]["n"]
    text = [
        f"On {count} seen tasks adapters generated from a task description reach {_p(generated)} "
        f"accuracy on average; trained ones {_p(total['trained']['mean'])}, the soup of each "
        f"task's trained adapters {_p(soup)}, the frozen base model alone {_p(base)}."
    ]
    for level in _levels(report):
        entry = report["unseen"][level]
        gap, count = entry["gap_recovered"].get("generated"), len(entry["table"])
        share = f", {_p(gap['mean'])} of what training would gain" if gap else ""
        text.append(
            f"{names.level(level)} ({count} task{'s' * (count > 1)}): generated adapters reach "
            f"{_p(entry['accuracy']['generated']['mean'])} accuracy where the base model alone has "
            f"{_p(entry['accuracy']['base']['mean'])}{share}; {against_best(entry)}."
        )
    return text


def against_best(level: Mapping[str, Any]) -> str:
    """Generated adapters against the best rival of a held-out level, in one of three states."""
    best = level.get("best_rival")
    if best is None:
        return "rivals that see the same texts were not measured"
    pair, label = best["paired"], names.method(best["method"]).label
    verdict = {
        "better": "better than the best rival",
        "worse": "worse than the best rival",
        "not distinguishable": "undecided against the best rival",
        schema.TOO_FEW: "compared with the best rival",
    }[claims.compared(pair)]
    few = f": {claims.FEW} are {schema.TOO_FEW} which is better"
    points = (
        f"{100 * pair['mean']:+.1f} points, {100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
    )
    return (
        f"generated {verdict}, {label} ({_p(best['accuracy'])}): {points.replace('-', '−')}"
        f"{few * (pair['n'] < claims.MIN_TASKS)}"
    )


def verdicts(report: Mapping[str, Any]) -> str:
    """How many claims hold, do not hold, and had too few tasks."""
    claimed = [claim["verdict"] for claim in report["claims"]]
    return ", ".join(f"{claimed.count(kind)} {_VERB[kind]}" for kind in schema.VERDICTS)


def condition(report: Mapping[str, Any]) -> str:
    """What shuffled, absent and paraphrased conditions do."""
    control, total = report["condition_controls"], report["summary"]
    return (
        f"With its own condition the generator reaches {_p(total['generated']['mean'])}, with a "
        f"paraphrased one {_p(control['paraphrased']['mean'])}, with that of another task "
        f"{_p(control['shuffled']['mean'])}, with none {_p(control['null']['mean'])}. The mean of "
        f"all adapters, which knows no task, reaches {_p(total['mean_adapter']['mean'])}: if a "
        "wrong condition costs nothing, the condition is ignored."
    )


def novelty(report: Mapping[str, Any]) -> str:
    """How to read the two ratios, and what they are here."""
    new, diverse = report["novelty_ratio"], report["diversity_ratio"]
    if new < 0.5:
        first = "generated adapters sit much closer to a training adapter than a retrained one does"
    elif new < 0.9:
        first = "generated adapters are somewhat closer to the training set than a retrained one"
    else:
        first = "generated adapters are about as far from the training set as a retrained one"
    if diverse < 0.5:
        second = "samples of one task resemble each other far more than training runs do"
    elif diverse < 0.9:
        second = "samples of one task differ less than training runs do"
    else:
        second = "samples of one task differ as much as training runs do"
    return (
        f"Novelty ratio {new:.2f}: {first} (0 is a copy, 1 is as new as training again with a new "
        f"seed). Diversity ratio {diverse:.2f}: {second}."
    )


def _levels(report: Mapping[str, Any]) -> list[str]:
    known = [level for level in names.LEVELS if level in report["unseen"]]
    return known
