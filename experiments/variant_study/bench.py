"""What the variants are trained on: a base model with tasks, each with three kinds of rows.

A bench hides what differs between texts that are classified, texts that are continued and pictures:
`pick` gives the inputs and the labels of rows, and a row's score is the share of its labels that
the logits rank first.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.text_methods import CONFIG
from experiments.merging import cells
from experiments.stages import world as world_lib
from experiments.stages.world import World
from jlora.types import Dynamic, Tree

Pick = Callable[[Tree, str, Dynamic, Dynamic], tuple[tuple[jax.Array, ...], jax.Array]]
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """Equal to itself only, so that what is compiled for one is compiled once."""

    name: str  # of the base model
    names: tuple[str, ...]  # of the tasks
    apply: Callable[..., jax.Array]  # (params, *inputs) -> logits [rows, ..., classes]
    base: Tree  # parameters
    data: Tree  # arrays that `pick` reads
    pick: Pick  # (data, split, task [], rows [n]) -> (inputs, labels [n, ...] int32)
    sizes: Mapping[str, int]  # split -> rows of each task
    key: str  # hash of what it was made from
    padding: Callable[..., Any] | None = None  # batch of inputs -> which tokens are none


def minilm(workdir: Path, cache: Path | None, *, toy: bool) -> Bench:
    """Four tasks of classifying short texts, on the last layer of MiniLM.

    Args:
      workdir: where the states of the texts are kept.
      cache: of downloads; None: the default.
      toy: a random encoder and made-up sentences.
    """
    config = CONFIG
    if toy:
        config = dataclasses.replace(config, base="tiny", tasks="toy", layers=1, max_length=8,
                                     train_texts=20, eval_rows=20, examples=4)  # fmt: skip
    return of_world(world_lib.build(config, workdir, cache))


def of_world(world: World) -> Bench:
    """The seen tasks of a world of texts."""
    names = tuple(world.names("seen"))
    rows, sizes = {}, {}
    for split in SPLITS:
        own = [world.rows[n, split] for n in names]
        sizes[split] = max(len(r.index) for r in own)
        rows[split] = tuple(
            jnp.asarray(np.stack([np.resize(getattr(r, k), sizes[split]) for r in own]), jnp.int32)
            for k in ("index", "label")
        )
    heads = jnp.asarray(np.stack([world.head_of(n) for n in names]))
    apply = cells.text_classifier(world.model, world.config.head_scale)
    data = {"rows": rows, "hidden": world.hidden, "mask": world.mask, "heads": heads}
    return Bench("minilm", names, apply, world.upper, data, _pick_texts, sizes,
                 world.config.key("data"), lambda batch: batch[1])  # fmt: skip


def _pick_texts(data: Tree, split: str, task: Dynamic, rows: Dynamic) -> Dynamic:
    index, label = (x[task][rows] for x in data["rows"][split])
    head = data["heads"][task]
    head = jnp.broadcast_to(head, (rows.shape[0], *head.shape))
    return (data["hidden"][index], data["mask"][index], head), label


def of_rows(
    name: str, apply: Callable[..., jax.Array], base: Tree, rows: Mapping[str, np.ndarray],
    names: tuple[str, ...], key: str,
) -> Bench:  # fmt: skip
    """Texts that are continued.

    Args:
      name: of the base model.
      apply: (params, ids [n, t]) -> logits [n, t, vocab].
      base: its parameters.
      rows: of each split, tokens [tasks, rows, t + 1].
      names: of the tasks.
      key: hash of what they were made from.
    """
    data = {split: jnp.asarray(ids, jnp.int32) for split, ids in rows.items()}
    sizes = {split: ids.shape[1] for split, ids in rows.items()}
    return Bench(name, names, apply, base, data, _pick_tokens, sizes, key)


def _pick_tokens(data: Tree, split: str, task: Dynamic, rows: Dynamic) -> Dynamic:
    ids = data[split][task][rows]
    return (ids[:, :-1],), ids[:, 1:]


def known() -> dict[str, Callable[..., Bench]]:
    """The benches by the name of their base: (workdir, cache, *, toy) -> bench."""
    from experiments.variant_study import continuation, vision

    return {"minilm": minilm, "base_l": continuation.base_l, "base_c": vision.base_c}


@functools.cache
def load(name: str, workdir: Path, cache: Path | None = None, toy: bool = False) -> Bench:
    """A bench, read once.

    Raises:
      ValueError: there is none of that name.
      AssetError: a pinned text or model cannot be had.
    """
    if name not in known():
        raise ValueError(f"--bases: got {name!r}, expected some of {sorted(known())}")
    return known()[name](workdir, cache, toy=toy)
