"""What a task is: described classes of single texts or of pairs, and where they come from."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

LEVELS = ("seen", "unseen_pair", "unseen_label", "unseen_corpus", "unseen_kind", "user")
SPLITS = ("train", "validation", "test")
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15
FEWEST, MOST = 2, 20  # classes of a task
SEPARATOR = "[SEP]"  # between the texts of a pair; a text of its own never holds it

Member = tuple[str, str]  # corpus, label
Texts = tuple[list[str], np.ndarray]  # texts, labels int32 [n] of 0 to C - 1


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of C classes; hashable, and plain data through ``dataclasses.asdict``."""

    name: str  # letters, digits, "_" and "-" only: fit for a file name and a report key
    corpus: str  # corpus of class 0 (and of class 1 but for kind "cross")
    level: str  # one of LEVELS
    description: str  # the written task: what the texts are, then what each class is
    class_names: tuple[str, ...]  # short human names
    class_descriptions: tuple[str, ...]  # a sentence each
    paraphrases: tuple[tuple[str, ...], ...]  # other wordings of the sentences, by class
    kind: str  # pair | rest | cross | labels | folder | glue | a key of forms.KINDS
    members: tuple[tuple[Member, ...], ...]  # the labels each class is made of
    source: str = "corpora"  # corpora | forms | folder:PATH | glue:PATH (empty PATH: the hub)

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ValueError(f"task {self.name}: level {self.level!r}, expected one of {LEVELS}")
        if not FEWEST <= self.classes <= MOST:
            raise ValueError(
                f"task {self.name}: got {self.classes} classes, expected {FEWEST} to {MOST}"
            )

    @property
    def classes(self) -> int:
        """C, how many classes it has."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Texts and labels of one task; the classes of a corpus task are of equal size."""

    train: Texts
    validation: Texts
    test: Texts


@dataclasses.dataclass(frozen=True)
class Caps:
    """Largest number of texts per class, by split."""

    train: int = 400
    validation: int = 100
    test: int = 200


_NUMBERS = (
    *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)


def describe(domain: str, class_descriptions: Sequence[str]) -> str:
    """The written description of a task, the same form for every source."""
    each = (f"Class {c}: {words}" for c, words in enumerate(class_descriptions))
    number = _NUMBERS[len(class_descriptions) - FEWEST]
    return f"Tell {number} classes of {domain} apart. {' '.join(each)}"


def joined(first: str, second: str) -> str:
    """A pair of texts as one text."""
    return f"{first} {SEPARATOR} {second}"


def parted(text: str) -> tuple[str, str] | None:
    """The texts of a pair; None for a single text."""
    first, mark, second = text.partition(f" {SEPARATOR} ")
    return (first, second) if mark else None


def slug(text: str) -> str:
    """``text`` in lower-case letters, digits and "_"."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text).strip("_").lower()


def split_of(unit: str) -> str:
    """Split of a unit (a text's opening or a document): the same in every task and corpus."""
    place = digest("split", unit) / 2**64
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def shuffled(items: list[str]) -> list[str]:
    """``items`` in an order that depends on their contents alone."""
    return sorted(items, key=lambda item: (digest("order", item), item))


def digest(purpose: str, text: str) -> int:
    """A number below 2**64 that depends on purpose and text alone."""
    return int.from_bytes(hashlib.sha256(f"jlora {purpose}|{text}".encode()).digest()[:8], "big")


def balanced(sides: Sequence[list[str]], cap: int) -> Texts:
    """The first n of each class in turn (0, 1, ..., 0, 1, ...), n = min(cap, all lengths)."""
    n = min(cap, *map(len, sides))
    texts = [text for each in zip(*(side[:n] for side in sides), strict=True) for text in each]
    return texts, np.tile(np.arange(len(sides), dtype=np.int32), n)
