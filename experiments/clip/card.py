"""The model directory of base C: weights, texts with their embeddings, examples, a quality card."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.clip import model, quality
from experiments.clip.data import Pairs
from experiments.clip.settings import Settings
from experiments.clip.texts import TEMPLATE
from experiments.workdir import digest, write_json
from jlora.io import safetensors_file

NAME, TEXTS, EXAMPLES = "card.json", "texts.safetensors", "examples.png"
READERS = (
    *("base C", "ridge on a random ViT", "ridge on colours"),
    *("base C, texts exchanged", "chance"),
)  # as `quality.figures` calls them
SHOWN = 12  # held-out pictures of each style in the examples


def write(
    folder: Path, settings: Settings, params: Any, pairs: Pairs, seconds: float, steps: int
) -> dict[str, Any]:
    """Writes the directory whole (temporary folder and rename) and returns the card.

    Args:
      folder: replaced if it exists.
      settings: of the run.
      params: averaged, float32.
      pairs: the pictures and texts.
      seconds: that training took.
      steps: of training.
    """
    temp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    config = settings.config(pairs.embeddings.shape[1])
    model.save(temp, config, params)
    params = model.load(temp)[1]  # what is measured is what was written
    half = pairs.embeddings.astype(np.float16)
    safetensors_file.write(temp / TEXTS, {"embeddings": half}, {"format": "jlora"})
    pairs = dataclasses.replace(pairs, embeddings=half.astype(np.float32))
    shown = examples(pairs, settings.seed)
    _sheet(pairs.pixels[shown], len(shown) // len(pairs.styles), temp / EXAMPLES)
    card: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "steps": steps,
        "seconds": seconds,
        "styles": list(pairs.styles),
        "names": list(pairs.names),
        "labels": list(pairs.labels),
        "held_out": sorted({pairs.names[n] for n in pairs.name[pairs.measured]}),
        "pictures": {
            style: [int((pairs.style[rows] == n).sum()) for rows in (pairs.train, pairs.measured)]
            for n, style in enumerate(pairs.styles)
        },
        "quality": quality.figures(config, params, pairs, settings.seed),
    }
    said = read(config, params, pairs, pairs.pixels[shown], card["held_out"])
    right = [pairs.names[n] for n in pairs.name[shown]]
    card["examples"] = [list(pair) for pair in zip(right, said, strict=True)]
    card["files"] = {p.name: digest(p) for p in sorted(temp.iterdir())}
    write_json(temp / NAME, card)
    (temp / "README.md").write_text(page(card), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temp, folder)
    return card


def examples(pairs: Pairs, seed: int) -> np.ndarray:
    """Up to SHOWN held-out rows of each style, as many of each.

    Args:
      pairs: the pictures.
      seed: of the choice.
    """
    own = [pairs.measured[pairs.style[pairs.measured] == n] for n in range(len(pairs.styles))]
    each, random = min(SHOWN, *(len(rows) for rows in own)), np.random.default_rng(seed)
    return np.concatenate([random.permutation(rows)[:each] for rows in own])


def read(
    config: model.ClipConfig, params: Any, pairs: Pairs, pixels: np.ndarray, among: Sequence[str]
) -> list[str]:
    """The name that fits each picture best.

    Args:
      config: of the CLIP.
      params: its parameters.
      pairs: names and embeddings.
      pixels: uint8 [n, 32, 32, 3].
      among: the candidates.
    """
    number = {name: n for n, name in enumerate(pairs.names)}
    chosen = pairs.embeddings[[number[name] for name in among]]
    u = quality.embedded(config, params, pixels)
    best = np.argmax(u @ np.asarray(model.texts(params, jnp.asarray(chosen))).T, axis=1)
    return [among[int(k)] for k in best]


def _sheet(pixels: np.ndarray, columns: int, path: Path) -> None:
    """Pictures as one image, row by row, without margins."""
    n, side = len(pixels), pixels.shape[1]
    grid = pixels.reshape(n // columns, columns, side, side, 3).swapaxes(1, 2)
    Image.fromarray(grid.reshape(n // columns * side, columns * side, 3)).save(path)


def shown(path: Path, side: int) -> np.ndarray:
    """The pictures of the examples, uint8 [n, side, side, 3], row by row."""
    with Image.open(path) as image:
        whole = np.asarray(image.convert("RGB"))
    rows, columns = whole.shape[0] // side, whole.shape[1] // side
    grid = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return grid.reshape(rows * columns, side, side, 3)


def _table(card: dict[str, Any]) -> list[str]:
    out = []
    for style in card["styles"]:
        x = card["quality"]["names"][style]
        rows = {k: x[k] for k in READERS}
        out += [f"| {style}, {x['pictures']} of {x['names']} names | {k} | {a:.1%} | {b:.1%} |"
                for k, (a, b) in rows.items()]  # fmt: skip
    return out


def page(card: dict[str, Any]) -> str:
    """The model card, Markdown.

    Args:
      card: of `write`.
    """
    s, q = card["settings"], card["quality"]
    seen = q["training names"]
    lines = [
        "# Base C", "",
        f"A tiny CLIP with {card['parameters']:,} parameters: a ViT of {s['depth']} blocks of width"
        f" {s['width']}, {s['heads']} heads, ffn {s['ffn']}, patches of {s['patch']} pixels,"
        f" 32 x 32 RGB, and a projection of each side to {s['joint']} numbers. The texts are"
        f" embedded by MiniLM-L6, which is frozen (\"{TEMPLATE.format('...')}\"). Weights in"
        " float16. It is a base for experiments with adapters, not a model to use.",
        "", "Trained from nothing by",
        "`python -m experiments.pretrain_clip --flagfile=experiments/flags/base_c.flags`:",
        f"{card['steps']} steps of {s['batch']} pairs in {card['seconds']:,.0f} seconds,"
        f" contrastive in both directions, {s['optimizer']}, seed {s['seed']}; these are the"
        f" averaged weights. Of the {len(card['names'])} names {len(card['held_out'])} are held"
        " out, in every style. Some are relatives of names that are not (\"pig\", \"pig face\").",
        "", "| style | trained on | held out (by name) |", "|---|---|---|",
        *(f"| {n} | {' | '.join(map(str, card['pictures'][n]))} |" for n in card["styles"]),
        "", "Zero-shot among the held-out names of a style; the rivals train no network"
        " (`experiments/clip/quality.py`):",
        "", "| pictures | by | top 1 | top 5 |", "|---|---|---|---|", *_table(card),
        "", f"Of {seen['names']} training names ({seen['style']}): top 1"
        f" {seen['base C'][0]:.1%}, top 5 {seen['base C'][1]:.1%}.",
        "", f"Zero-shot among the {len(card['labels'])} categories:", "",
        "| pictures of | base C | most frequent category |", "|---|---|---|",
        *(f"| {n} | {x['base C']:.1%} | {x['most frequent']:.1%} |"
          for n, x in sorted(q["categories"].items())),
        "", f"![examples]({EXAMPLES})", "",
        "Held-out pictures, a row per style; what it says among all held-out names:", "",
        *(f"- {name}: {'right' if name == said else said}" for name, said in card["examples"]),
        "", "Google's emoji (Noto) are Apache-2.0, Twitter's (Twemoji) CC BY 4.0, Fluent MIT,"
        " MiniLM-L6 Apache-2.0.",
        "", "| file | sha256 |", "|---|---|",
        *(f"| {name} | {sha} |" for name, sha in sorted(card["files"].items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
