"""The model directory of base D: weights, names, classifier, sheet of samples, and a quality card.

The card draws samples for names that were trained on and for names that were not, has the
classifier read them, and puts next to every figure the same figure of real pictures.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.pictures import classifier, quality
from experiments.pictures.data import Pictures
from experiments.pictures.sampling import sample, sheet
from experiments.pictures.settings import Settings
from experiments.pictures.train import architecture
from experiments.workdir import digest, write_json
from jlora.models import dit

NAME, NAMES, SHEET = "card.json", "names.json", "samples.png"
OPENMOJI, FLUENT = "OpenMoji CC BY-SA 4.0", "Microsoft's Fluent emoji MIT"
LICENCES = {  # of the styles of `sources`
    "google": "Google's emoji (Noto) Apache-2.0", "twitter": "Twitter's emoji (Twemoji) CC BY 4.0",
    "openmoji": OPENMOJI, "outline": OPENMOJI, "fluent": FLUENT, "fluent_modern": FLUENT,
    "fluent_contrast": FLUENT, "mnist": "MNIST MIT", "fashion": "Fashion-MNIST MIT",
}  # fmt: skip
COLUMNS = 12  # of the sheet
SEEN, UNSEEN = "seen names", "held-out names"


def write(
    folder: Path, settings: Settings, params: Any, judge: Any, pictures: Pictures, seconds: float,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Writes the directory whole (temporary folder and rename) and returns the card.

    Args:
      folder: replaced if it exists.
      settings: of the run.
      params: averaged, float32.
      judge: parameters of the classifier.
      pictures: the pictures.
      seconds: that training took.
      steps: of training.
    """
    temp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    config = architecture(settings, pictures)
    dit.save(temp, config, params)
    params = dit.load(temp)[1]  # what is measured is what was written
    classifier.save(temp / "classifier.safetensors", judge)
    names = {k: list(getattr(pictures, k)) for k in ("styles", "labels", "vocabulary")}
    write_json(temp / NAMES, names | {"longest_name": pictures.words.shape[1]})
    chosen = {
        name: quality.balanced(pictures, rows, settings.samples, settings.seed)
        for name, rows in ((SEEN, pictures.train), (UNSEEN, pictures.measured))
    }
    drawn = {
        name: sample(params, config, pictures.style[rows], pictures.words[rows],
                     settings.sample_steps, settings.guidance, settings.seed)
        for name, rows in chosen.items()
    }  # fmt: skip
    sheet(_lines(pictures, chosen, drawn), temp / SHEET)
    card: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "steps": steps,
        "seconds": seconds,
        "pictures": {
            style: [
                int((pictures.style[rows] == n).sum())
                for rows in (pictures.train, pictures.measured)
            ]
            for n, style in enumerate(pictures.styles, 1)
        },
        "quality": figures(settings, judge, pictures, chosen, drawn),
    }
    card["files"] = {p.name: digest(p) for p in sorted(temp.iterdir())}
    write_json(temp / NAME, card)
    (temp / "README.md").write_text(page(card), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temp, folder)
    return card


def figures(
    settings: Settings, judge: Any, pictures: Pictures, chosen: dict[str, np.ndarray],
    drawn: dict[str, np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """Accuracies, Fréchet distances and distances to training pictures.

    Args:
      settings: of the run.
      judge: parameters of the classifier.
      pictures: the pictures.
      chosen: rows whose style and name were asked for, by kind of name.
      drawn: the samples.
    """
    read = lambda pixels: classifier.apply(pictures, judge, pixels)  # noqa: E731
    accuracy, features = {}, {}
    for name, pixels in drawn.items():
        features[name], *said = read(pixels)
        accuracy[f"samples of {name}"] = quality.accuracies(pictures, chosen[name], *said)
    for name, rows in (("training", chosen[SEEN]), ("held-out", pictures.measured)):
        features[name], *said = read(pictures.pixels[rows])
        accuracy[f"real {name} pictures"] = quality.accuracies(pictures, rows, *said)
    real = read(pictures.pixels[chosen[UNSEEN]])[0]  # as many of each style as the samples
    bank = pictures.pixels[pictures.train]
    distance = {name: round(quality.frechet(features[name], real), 3)
                for name in (SEEN, UNSEEN, "training")}  # fmt: skip
    near = {name: dict(quality.near(drawn[name], pictures.pixels[chosen[UNSEEN]], bank))
            for name in (SEEN, UNSEEN)}  # fmt: skip
    return {"accuracy": accuracy, "frechet": distance, "nearest": near}


def _lines(
    pictures: Pictures, chosen: dict[str, np.ndarray], drawn: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Per style: real pictures, samples of their names, samples of held-out names."""
    lines = []
    for n in range(1, len(pictures.styles) + 1):
        own = {name: np.flatnonzero(pictures.style[rows] == n)[:COLUMNS]
               for name, rows in chosen.items()}  # fmt: skip
        lines += [pictures.pixels[chosen[SEEN][own[SEEN]]], drawn[SEEN][own[SEEN]],
                  drawn[UNSEEN][own[UNSEEN]]]  # fmt: skip
    return lines


def licences(styles: list[str]) -> list[str]:
    """Who drew the pictures of some styles, and under which licence, each source once."""
    return list(dict.fromkeys(LICENCES[style] for style in styles))


def page(card: dict[str, Any]) -> str:
    """The model card, Markdown.

    Args:
      card: of `write`.
    """
    s, q = card["settings"], card["quality"]
    kind = f"AdaLN-LoRA of rank {s['rank']}" if s["rank"] else "adaLN"
    lines = [
        "# Base D", "",
        f"A DiT on pixels with {card['parameters']:,} parameters: {s['depth']} blocks of width"
        f" {s['width']}, {s['heads']} heads, ffn {s['ffn']}, patches of {s['patch']} pixels,"
        f" {kind}, 32 x 32 RGB. Asked by style and by the words of a name. Weights in float16. It"
        " is a base for experiments with adapters, not a model to use.",
        "", "Trained from nothing by",
        "`python -m experiments.pretrain_pictures --flagfile=experiments/flags/base_d.flags`:",
        f"{card['steps']} steps of {s['batch']} pictures in {card['seconds']:,.0f} seconds,"
        f" rectified flow, {s['optimizer']}, seed {s['seed']}; these are the averaged weights.",
        "", "| style | trained on | held out (by name) |", "|---|---|---|",
        *(f"| {n} | {a} | {b} |" for n, (a, b) in card["pictures"].items()),
        "", f"Samples: {s['sample_steps']} Euler steps, guidance {s['guidance']}. Said by our own"
        " classifier (`classifier.safetensors`), whose accuracy on real pictures is the yardstick:",
        "", "| pictures | style | label | number |", "|---|---|---|---|",
        *(f"| {n} | {x['style']:.1%} | {x['label']:.1%} | {x['pictures']} |"
          for n, x in q["accuracy"].items()),
        "", "Label by style:", "",
        f"| pictures | {' | '.join(card['pictures'])} |",
        "|---" * (1 + len(card["pictures"])) + "|",
        *("| " + " | ".join([n, *(f"{x[style]['label']:.1%}" if style in x else "-"
                                  for style in card["pictures"])]) + " |"
          for n, x in q["accuracy"].items()),
        "", "Fréchet distance to held-out real pictures in the features of that classifier (no"
        " other figure in the literature compares): "
        + ", ".join(f"{n} {x}" for n, x in q["frechet"].items()) + ".",
        "", "Distance to the nearest training picture (root mean square, grey levels of 255):", "",
        *(f"- {kind}, {n}: {x}" for kind, near in q["nearest"].items() for n, x in near.items()),
        "", f"![samples]({SHEET})", "",
        "Three rows per style: real training pictures, samples of their names, samples of held-out"
        " names.", "",
        f"Licences of the pictures: {', '.join(licences(list(card['pictures'])))}.",
        "", "| file | sha256 |", "|---|---|",
        *(f"| {name} | {sha} |" for name, sha in sorted(card["files"].items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
