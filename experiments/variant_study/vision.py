"""Base C names pictures of four kinds that it was not trained on: drawings, digits, clothes.

A task is one source of pictures, whose classes are the texts of its labels. The rows that
`experiments.pictures.sources` holds out are for testing; of the others every fourth is for choosing
rates. Pictures keep their bytes; `pick` turns those of a step into -1 .. 1.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import clip_training as clip
from experiments.clip import model
from experiments.pictures import sources
from experiments.variant_study.bench import Bench
from jlora.models.vit import VitConfig
from jlora.types import Dynamic, Tree

STYLES = ("openmoji", "outline", "mnist", "fashion")
CLASSES, EVERY = 10, 4  # of the head, empty ones too; one of so many rows chooses the rate
ROWS = {"train": 256, "validation": 64, "test": 128}  # at most, of each task


def base_c(workdir: Path, cache: Path | None, *, toy: bool) -> Bench:
    """The four sources of pictures.

    Args:
      workdir: not read; nothing is kept.
      cache: not read; pictures are in the default cache.
      toy: a tiny random vision transformer and random pictures.
    """
    del workdir, cache
    if toy:
        return _toy()
    base = clip.base()
    parts: dict[str, list[clip.Rows]] = {split: [] for split in ROWS}
    tasks = [clip.task(style, CLASSES) for style in STYLES]
    for task in tasks:
        for split, rows in splits(task).items():
            parts[split].append(rows)
    blob = json.dumps([STYLES, CLASSES, EVERY, ROWS, base.card["files"]], sort_keys=True)
    heads = clip.Head(*(jnp.stack(x) for x in zip(*(t.head for t in tasks), strict=True)))
    return of_pictures(clip.classifier(base.config), base.params, parts, heads, STYLES,
                       hashlib.sha256(blob.encode()).hexdigest())  # fmt: skip


def splits(task: clip.Task) -> dict[str, clip.Rows]:
    """The rows of each split; of more than `ROWS` those at even distances in a random order.

    Args:
      task: with its training and test rows.
    """
    draw = np.random.default_rng(53)
    order, test = draw.permutation(len(task.train.label)), draw.permutation(len(task.test.label))
    chosen = {"train": np.delete(order, np.s_[::EVERY]), "validation": order[::EVERY]}
    rows = {split: clip.Rows(*(x[at[: ROWS[split]]] for x in task.train))
            for split, at in chosen.items()}  # fmt: skip
    return rows | {"test": clip.Rows(*(x[test[: ROWS["test"]]] for x in task.test))}


def of_pictures(
    apply: Any, base: Tree, parts: dict[str, list[clip.Rows]], heads: clip.Head,
    names: tuple[str, ...], key: str,
) -> Bench:  # fmt: skip
    """A bench of pictures.

    Args:
      apply: (params, pictures [n, side, side, 3], Head) -> logits [n, K].
      base: its parameters.
      parts: rows of each task by split; tasks with fewer rows than others repeat theirs.
      heads: of the tasks, leaves [tasks, ...].
      names: of the tasks.
      key: hash of what they were made from.
    """
    sizes = {split: max(len(r.label) for r in each) for split, each in parts.items()}
    rows = {
        split: tuple(
            jnp.asarray(np.stack([_repeated(x, sizes[split]) for x in kind]))
            for kind in zip(*each, strict=True)
        )
        for split, each in parts.items()
    }
    data = {"rows": rows, "heads": heads}
    return Bench("base_c", names, apply, base, data, _pick_pictures, sizes, key)


def _repeated(values: np.ndarray, size: int) -> np.ndarray:
    return values[np.resize(np.arange(len(values)), size)]


def _pick_pictures(data: Tree, split: str, task: Dynamic, rows: Dynamic) -> Dynamic:
    pixels, label = (x[task][rows] for x in data["rows"][split])
    head = clip.Head(*(x[task] for x in data["heads"]))
    return ((pixels.astype(jnp.float32) - 127.5) / 127.5, head), label


@functools.cache
def _toy() -> Bench:
    vit = VitConfig(side=sources.SIDE, patch=16, layers=1, width=48, heads=3, ffn=64)
    config = model.ClipConfig(vit, text=8, joint=8)
    params = model.init(jax.random.key(0), config, jnp.zeros(8))
    draw = np.random.default_rng(0)
    side = sources.SIDE
    parts = {split: [clip.Rows(draw.integers(0, 256, (n, side, side, 3), np.uint8),
                               draw.integers(0, 3, n).astype(np.int32)) for _ in range(2)]
             for split, n in (("train", 20), ("validation", 8), ("test", 8))}  # fmt: skip
    heads = clip.Head(jnp.asarray(draw.normal(size=(2, 3, 8)), jnp.float32), jnp.zeros((2, 3)))
    return of_pictures(clip.classifier(config), params, parts, heads, ("first", "second"), "toy")
