"""The card of a generator: what it was trained on, how good it is, where it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.generating.measure import KEYS, Figures
from experiments.report import bootstrap, names
from experiments.stages.world import World

if TYPE_CHECKING:
    from experiments.generating.run import Trained

LABELS = {
    "generated": "**generated adapter**",
    "nearest_mean": "nearest class mean of the base's embeddings",
    "knn": "k nearest neighbours of the base's embeddings",
    "logreg": "logistic regression on the base's embeddings",
    "lora_k": "LoRA trained on the examples (some tasks, one draw)",
    "forgetful": "the generated adapter without the memory of classes",
    "shuffled": "control: labels of the examples shuffled",
    "logreg_full": "logistic regression on all training texts",
}
NO_LORA = "- LoRA trained on the examples was not measured for this card."
RIVALS = ("nearest_mean", "knn", "logreg", "lora_k")  # what one can do without the generator
SAID = ("tasks", "data_seed", "train_texts", "examples", "seed")


def make(world: World, trained: Trained, figures: Figures) -> dict[str, Any]:
    """Everything the page says but the sha256 of the files.

    Args:
      world: of all tasks.
      trained: the run.
      figures: of `measure`.
    """
    config = world.config
    seen = [world.task(name) for name in trained.tasks]
    accuracy = {
        name: {"level": world.task(name).level, **methods}
        for name, methods in figures.accuracy.items()
    }
    return {
        "settings": {name: getattr(config, name) for name in SAID},
        "base": config.base,
        "layers": config.layers,
        "max_length": config.max_length,
        "remembered": 0 if trained.fitted.known is None else len(trained.fitted.known.rows),
        "seen": {task.name: [task.description, list(task.class_names)] for task in seen},
        "corpora": sorted({corpus for task in seen for side in task.members for corpus, _ in side}),
        "lora": None if figures.lora is None else figures.lora._asdict(),
        "accuracy": accuracy,
        "levels": levels(accuracy),
    }


def levels(accuracy: dict[str, Any]) -> dict[str, Any]:
    """{level: tasks, mean of each method, generated minus each rival on the same tasks}.

    Args:
      accuracy: task -> its level and each method's accuracies, one per draw.
    """
    out: dict[str, Any] = {}
    for level in dict.fromkeys(row["level"] for row in accuracy.values()):
        rows = [row for row in accuracy.values() if row["level"] == level]
        means, leads = {}, {}
        for key in KEYS:
            own = [row for row in rows if key in row]
            if not own:
                continue
            values = [float(np.mean(row[key])) for row in own]
            means[key] = {"mean": round(float(np.mean(values)), 4), "tasks": len(own)}
            if key in RIVALS:
                # LoRA saw the first draw alone: it is compared with what that draw generates.
                base = [float(np.mean(row["generated"][: len(row[key])])) for row in own]
                pair = bootstrap.paired(base, values)
                leads[key] = {k: round(float(pair[k]), 4) for k in ("mean", "low", "high")}
        out[level] = {"tasks": len(rows), "means": means, "leads": leads}
    return out


def _ordered(card: dict[str, Any]) -> dict[str, Any]:
    """Levels in the order of every report; the card's file has them by name."""
    return {level: card["levels"][level] for level in names.LEVELS if level in card["levels"]}


def table(card: dict[str, Any]) -> list[str]:
    """The figures, Markdown.

    Args:
      card: of `make`.
    """
    every = _ordered(card)
    heads = [f"{names.level(level)} ({figures['tasks']})" for level, figures in every.items()]
    if not every:
        return ["No held-out task."]
    lines = [f"| test accuracy, % | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    there = [key for key in KEYS if any(key in figures["means"] for figures in every.values())]
    for key in there:
        cells = []
        for figures in every.values():
            mean = figures["means"].get(key)
            lead = figures["leads"].get(key)
            text = "–" if mean is None else f"{100 * mean['mean']:.1f}"
            if mean is not None and mean["tasks"] < figures["tasks"]:
                text += f" (of {mean['tasks']})"
            if lead is not None:
                low, high = 100 * lead["low"], 100 * lead["high"]
                text += f"; {100 * lead['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells.append(text)
        lines.append(f"| {LABELS[key]} | {' | '.join(cells)} |")
    return lines


def verdicts(card: dict[str, Any]) -> list[str]:
    """For each level, whether the generated adapter is ahead of its best rival.

    Args:
      card: of `make`.
    """
    out = []
    for level, figures in _ordered(card).items():
        key = min(figures["leads"], key=lambda k: figures["leads"][k]["mean"])
        lead, rival = figures["leads"][key], LABELS[key]
        if lead["low"] > 0:
            said = f"the generated adapter is ahead of every rival, of {rival} by the least"
        elif lead["high"] < 0:
            said = f"the generated adapter is **behind** {rival}"
        else:
            said = f"the generated adapter is not distinguishable from {rival}"
        out.append(f"- {names.level(level)}: {said} ({100 * lead['mean']:+.1f} points).")
    return out


def page(card: dict[str, Any]) -> str:
    """The model card, Markdown.

    Args:
      card: of `make`, with its files.
    """
    s, seen = card["settings"], card["seen"]
    lines = [
        f"# A generator of adapters for {card['base']}", "",
        "Labelled texts in, one LoRA adapter out, without training: the discriminant of the texts"
        f" over what enters the last {card['layers']} layers' feed-forward outputs, written into"
        f" these matrices as one rank per class. It remembers {card['remembered']} classes of its"
        " training tasks, and leans on one that it recognises"
        " (`jlora.generation.generators.layered`). `jlora generate` reads it.", "",
        "Computed by `python -m experiments.pretrain_generator"
        " --flagfile=experiments/flags/minilm_generator.flags` in one pass over the training texts:"
        f" no step of training, one seed ({s['seed']}).", "",
        f"Held-out tasks, {s['examples']} texts of each class, mean over tasks and draws of the"
        " texts; in brackets the lead of the generated adapter over a rival with its 95 %"
        " interval (bootstrap over tasks). All is measured on the files as they are.", "",
        *table(card), "", *verdicts(card), "",
        "## Limits", "",
        f"- Texts are cut at {card['max_length']} tokens.",
        "- The settings of the discriminant were chosen while looking at held-out tasks of another"
        " `--data_seed`, whose unseen corpora and kinds are the same.",
        f"- English texts of {', '.join(card['corpora'])}. One seed; the tasks share labels and"
        " corpora, so that the intervals are somewhat too narrow.",
        "- Where a lead has an interval that contains 0, the simpler method is as good: `jlora"
        " generate` compares them on your own examples and says which to use.",
        "- It is of one base: `config.json` has the sha256 of its weights.",
        *([] if card["lora"] else [NO_LORA]),
        "",
        f"## The {len(seen)} training tasks", "",
        *(f"- {words} ({' / '.join(classes)})" for _, (words, classes) in sorted(seen.items())), "",
        "| file | sha256 |", "|---|---|",
        *(f"| {name} | {sha} |" for name, sha in sorted(card["files"].items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
