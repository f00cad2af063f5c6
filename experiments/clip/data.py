"""Pictures with their names and categories as arrays, and the embeddings of these texts.

Text n is the n-th name; text ``len(names) + m`` is the m-th category.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.pictures.sources import Picture
from experiments.workdir import StageError, read_json, save_array, write_json

FIELDS = ("pixels", "style", "name", "label", "held_out", "embeddings")
LISTS = ("styles", "names", "labels")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pictures of a run and all texts that are true of some."""

    styles: tuple[str, ...]
    names: tuple[str, ...]  # "grinning face"
    labels: tuple[str, ...]  # categories: "Food & Drink"
    pixels: np.ndarray  # uint8 [n, 32, 32, 3]
    style: np.ndarray  # int32 [n], 0 .. styles - 1
    name: np.ndarray  # int32 [n]
    label: np.ndarray  # int32 [n]
    held_out: np.ndarray  # bool [n]: no picture of that name is trained on
    embeddings: np.ndarray  # float32 [names + labels, 384], unit

    @property
    def train(self) -> np.ndarray:
        """Rows to train on, int64 [n]."""
        return np.flatnonzero(~self.held_out)

    @property
    def measured(self) -> np.ndarray:
        """Held-out rows, int64 [n]."""
        return np.flatnonzero(self.held_out)

    @property
    def sided(self) -> np.ndarray:
        """Whether a name says left or right, bool [names]: its mirror image is another thing."""
        return np.asarray([bool({"left", "right"} & set(x.split())) for x in self.names])


def gathered(pictures: Sequence[Picture], styles: tuple[str, ...]) -> Pairs:
    """The arrays of some pictures, without embeddings (of width 0).

    Args:
      pictures: of any styles.
      styles: their names, in the order of their numbers.

    Raises:
      ValueError: a style without pictures to train on or to measure by; a name of which only some
        pictures are held out.
    """
    for style in styles:
        kinds = {p.held_out for p in pictures if p.style == style}
        if kinds != {False, True}:
            raise ValueError(f"{style}: got no pictures to train on or none held out")
    held: dict[str, bool] = {}
    for p in pictures:
        name = " ".join(p.words)
        if held.setdefault(name, p.held_out) != p.held_out:
            raise ValueError(f"{name}: got pictures of both kinds, expected all or none held out")
    names, labels = tuple(sorted(held)), tuple(sorted({p.label for p in pictures}))
    number = {name: n for n, name in enumerate(names)}
    return Pairs(
        styles, names, labels, np.stack([p.pixels for p in pictures]),
        np.asarray([styles.index(p.style) for p in pictures], np.int32),
        np.asarray([number[" ".join(p.words)] for p in pictures], np.int32),
        np.asarray([labels.index(p.label) for p in pictures], np.int32),
        np.asarray([p.held_out for p in pictures]),
        np.zeros((len(names) + len(labels), 0), np.float32),
    )  # fmt: skip


def save(folder: Path, pairs: Pairs) -> None:
    """Writes ``pairs.npz`` and, last, ``pairs.json``."""
    save_array(folder / "pairs.npz", **{name: getattr(pairs, name) for name in FIELDS})
    write_json(folder / "pairs.json", {k: list(getattr(pairs, k)) for k in LISTS})


def load(folder: Path) -> Pairs | None:
    """What `save` wrote, or None where it has not.

    Raises:
      StageError: a file of another form.
    """
    about = folder / "pairs.json"
    if not about.is_file():
        return None
    names = read_json(about, dict, f"delete {folder}")
    try:
        with np.load(folder / "pairs.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in FIELDS}
        return Pairs(**{k: tuple(names[k]) for k in LISTS}, **arrays)
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{about}: cannot be read ({error}); delete {folder}") from error
