"""Pictures as arrays: pixels, style, label and words by number, training rows and held-out ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.pictures.sources import Picture
from experiments.workdir import StageError, read_json, save_array, write_json

PADDING, UNKNOWN = 0, 1  # rows of the table of words; the words themselves follow
FIELDS = ("pixels", "style", "label", "words", "held_out")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """All pictures of a run."""

    styles: tuple[str, ...]  # number 1 is the first; 0 is "none" of a model
    labels: tuple[str, ...]
    vocabulary: tuple[str, ...]  # word 2 is the first
    pixels: np.ndarray  # uint8 [n, 32, 32, 3]
    style: np.ndarray  # int32 [n], 1 .. styles
    label: np.ndarray  # int32 [n], 0 .. labels - 1
    words: np.ndarray  # int32 [n, longest name], padded
    held_out: np.ndarray  # bool [n]

    @property
    def train(self) -> np.ndarray:
        """Rows to train on, int64 [n]."""
        return np.flatnonzero(~self.held_out)

    @property
    def measured(self) -> np.ndarray:
        """Held-out rows, int64 [n]."""
        return np.flatnonzero(self.held_out)

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """Words by number, int32 [longest name].

        Raises:
          ValueError: more words than the longest name has.
        """
        size = self.words.shape[1]
        if len(words) > size:
            raise ValueError(f"words: got {len(words)}, expected at most {size}")
        known = {word: n for n, word in enumerate(self.vocabulary, 2)}
        numbers = [known.get(word, UNKNOWN) for word in words]
        return np.asarray(numbers + [PADDING] * (size - len(numbers)), np.int32)


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Bytes as float32 in -1 .. 1, as the model reads them."""
    return (pixels.astype(np.float32) - 127.5) / 127.5


def bytes_of(pictures: np.ndarray) -> np.ndarray:
    """What `scaled` makes float32, as bytes again; what lies outside is cut off."""
    return np.clip(np.round(pictures * 127.5 + 127.5), 0, 255).astype(np.uint8)


def gathered(pictures: Sequence[Picture], styles: tuple[str, ...]) -> Pictures:
    """The arrays of some pictures; words are numbered by the names that are trained on.

    Args:
      pictures: of any styles.
      styles: their names, in the order of their numbers.

    Raises:
      ValueError: a style without pictures to train on or to measure by.
    """
    for style in styles:
        kinds = {p.held_out for p in pictures if p.style == style}
        if kinds != {False, True}:
            raise ValueError(f"{style}: got no pictures to train on or none held out")
    labels = tuple(sorted({p.label for p in pictures}))
    vocabulary = tuple(sorted({w for p in pictures if not p.held_out for w in p.words}))
    empty = np.zeros((len(pictures), max(len(p.words) for p in pictures)), np.int32)
    result = Pictures(
        styles, labels, vocabulary, np.stack([p.pixels for p in pictures]),
        np.asarray([styles.index(p.style) + 1 for p in pictures], np.int32),
        np.asarray([labels.index(p.label) for p in pictures], np.int32), empty,
        np.asarray([p.held_out for p in pictures]),
    )  # fmt: skip
    return dataclasses.replace(result, words=np.stack([result.encode(p.words) for p in pictures]))


def save(folder: Path, pictures: Pictures) -> None:
    """Writes ``pictures.npz`` and, last, ``pictures.json``."""
    save_array(folder / "pictures.npz", **{name: getattr(pictures, name) for name in FIELDS})
    names = {k: list(getattr(pictures, k)) for k in ("styles", "labels", "vocabulary")}
    write_json(folder / "pictures.json", names)


def load(folder: Path) -> Pictures | None:
    """What `save` wrote, or None where it has not.

    Raises:
      StageError: a file of another form.
    """
    about = folder / "pictures.json"
    if not about.is_file():
        return None
    names = read_json(about, dict, f"delete {folder}")
    try:
        with np.load(folder / "pictures.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in FIELDS}
        return Pictures(
            **{k: tuple(names[k]) for k in ("styles", "labels", "vocabulary")}, **arrays
        )
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{about}: cannot be read ({error}); delete {folder}") from error
