"""Pinned pictures by style: emoji as several artists drew them, digits and clothes.

Every picture is 32 x 32, RGB, on white, and has words (its name), a label (an emoji's category, a
digit, a kind of clothes) and a group that is held out as a whole. The group of an emoji is its
name, so a name that is held out was never trained on in any style; of digits and clothes, whose
names are their classes, every picture is a group. Emoji are those of `emoji.json` without
components and skin tones; a style has those of them that its package holds.

Sizes: 64 pixels to 32 by averages of 2 x 2; digits and clothes of 28 x 28 get a margin of 2 and
their ink is dark. Drawings in SVG are rendered by resvg, without fonts of the machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.data import assets, pinned
from experiments.workdir import StageError

SIDE = 32
DRAWN = 64  # pixels of an emoji before it is made smaller
HELD_OUT = 10  # of 100 groups
EACH = 1000  # pictures of a digit or of a kind of clothes, at most
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES = (
    *("t shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture."""

    style: str  # key of STYLES
    words: tuple[str, ...]  # of its name, lower case
    label: str  # "Food & Drink", "digit seven", "ankle boot"
    group: str  # what is held out as a whole
    pixels: np.ndarray  # uint8 [32, 32, 3]

    @property
    def held_out(self) -> bool:
        """Whether it is for measuring only."""
        blob = hashlib.sha256(self.group.encode()).digest()
        return int.from_bytes(blob[:8], "big") % 100 < HELD_OUT


def words(name: str) -> tuple[str, ...]:
    """The words of a name: letters and digits without accents, lower case."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return tuple(re.findall(r"[a-z0-9]+", plain.lower().replace("'", "").replace(".", "")))


def small(picture: Image.Image) -> np.ndarray:
    """A drawing with transparent ground as uint8 [32, 32, 3] on white."""
    ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    ground.alpha_composite(picture.convert("RGBA"))
    return np.asarray(ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def grey(ink: np.ndarray) -> np.ndarray:
    """Ink in 0..255, [28, 28], as uint8 [32, 32, 3]: dark on white, in the middle."""
    margin = (SIDE - len(ink)) // 2
    paper = 255 - np.pad(ink, margin)
    return np.repeat(paper.astype(np.uint8)[..., None], 3, axis=-1)


def rendered(path: Path) -> np.ndarray:
    """A drawing in SVG as uint8 [32, 32, 3] on white."""
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise StageError(f"{path}: a drawing in SVG needs resvg: pip install resvg-py") from None
    data = resvg_py.svg_to_bytes(
        svg_path=str(path), width=DRAWN, height=DRAWN, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(data))) as picture:
        return small(picture)


Find = Callable[[Mapping[str, Any], tuple[str, ...]], list[str]]


def _emoji(
    style: str, asset: str, find: Find, read: Callable[[Path], np.ndarray], cache: Path | None
) -> Iterator[Picture]:
    """Those emoji of which one of the files that `find` names is in a package."""
    listed = assets.fetch(pinned.ASSETS["emoji_google"], cache) / "package/emoji.json"
    folder = assets.fetch(pinned.ASSETS[asset], cache) / "package"
    for entry in json.loads(listed.read_text(encoding="utf-8")):
        if entry["category"] == "Component":
            continue
        name = words(entry["name"])
        files = (folder / path for path in find(entry, name))
        if path := next((p for p in files if p.is_file()), None):
            group = f"emoji {' '.join(name)}"
            yield Picture(style, name, entry["category"], group, read(path))


def _png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return small(picture)


def _by_image(style: str) -> Find:
    return lambda entry, name: [f"img/{style}/64/{entry['image']}"]


def _by_code(folder: str) -> Find:
    def find(entry: Mapping[str, Any], name: tuple[str, ...]) -> list[str]:
        whole = entry["unified"]
        return [f"{folder}/svg/{code}.svg" for code in (whole, whole.replace("-FE0F", ""))]

    return find


def _by_name(folder: str) -> Find:
    return lambda entry, name: [f"icons/{folder}/{'-'.join(name)}.svg"]


def _rows(
    style: str, asset: str, folder: str, names: tuple[str, ...], scale: float, cache: Path | None
) -> Iterator[Picture]:
    """Classes of grey pictures, a file each: lists of 784 numbers, or all numbers of a class."""
    root = assets.fetch(pinned.ASSETS[asset], cache) / "package" / "src" / folder
    for number, name in enumerate(names):
        data = json.loads((root / f"{number}.json").read_text())["data"]
        if isinstance(data[0], list):  # a file of clothes has empty rows, which are no pictures
            data = [row for row in data if row]
        ink = np.asarray(data, np.float32).reshape(-1, 28, 28)[:EACH] * scale
        for place, picture in enumerate(np.round(ink)):
            yield Picture(style, words(name), name, f"{style} {number} {place}", grey(picture))


Read = Callable[[Path | None], Iterator[Picture]]
STYLES: dict[str, Read] = {
    "google": functools.partial(
        _emoji, "google", "emoji_google", _by_image("google"), _png
    ),
    "twitter": functools.partial(
        _emoji, "twitter", "emoji_twitter", _by_image("twitter"), _png
    ),
    "openmoji": functools.partial(
        _emoji, "openmoji", "openmoji", _by_code("color"), rendered
    ),
    "outline": functools.partial(
        _emoji, "outline", "openmoji", _by_code("black"), rendered
    ),
    "fluent": functools.partial(
        _emoji, "fluent", "fluent_emoji", _by_name("flat"), rendered
    ),
    "fluent_modern": functools.partial(
        _emoji, "fluent_modern", "fluent_emoji", _by_name("modern"), rendered
    ),
    "fluent_contrast": functools.partial(
        _emoji, "fluent_contrast", "fluent_emoji", _by_name("high-contrast"), rendered
    ),
    "mnist": functools.partial(
        _rows, "mnist", "mnist", "digits", tuple(f"digit {d}" for d in DIGITS), 255.0
    ),
    "fashion": functools.partial(_rows, "fashion", "fashion_mnist", "clothes", CLOTHES, 1.0),
}  # fmt: skip


def pictures(styles: tuple[str, ...], cache: Path | None = None) -> list[Picture]:
    """All pictures of some styles, in the order of the files.

    Args:
      styles: keys of STYLES.
      cache: of downloads.

    Raises:
      AssetError: a package cannot be had.
      StageError: a style of drawings in SVG without their renderer.
    """
    return [picture for style in styles for picture in STYLES[style](cache)]
