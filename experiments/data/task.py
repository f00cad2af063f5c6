"""What a task is: two described classes, and where their texts come from."""

import dataclasses
import hashlib

import numpy as np

LEVELS = ("seen", "unseen_pair", "unseen_label", "unseen_corpus", "user")
SPLITS = ("train", "validation", "test")
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15

Member = tuple[str, str]  # corpus, label
Texts = tuple[list[str], np.ndarray]  # texts, labels int32 [n] of 0 and 1


@dataclasses.dataclass(frozen=True)
class Task:
    """A two-class text task; hashable, and plain data through ``dataclasses.asdict``."""

    name: str  # letters, digits, "_" and "-" only: fit for a file name and a report key
    corpus: str  # corpus of class 0 (and of class 1 but for kind "cross")
    level: str  # one of LEVELS
    description: str  # the written task: what the texts are, what class 0 is, what class 1 is
    class_names: tuple[str, str]  # short human names
    class_descriptions: tuple[str, str]  # a sentence each
    paraphrases: tuple[tuple[str, ...], tuple[str, ...]]  # other wordings of the sentences
    kind: str  # pair | rest | cross | folder | glue
    members: tuple[tuple[Member, ...], tuple[Member, ...]]  # the labels each class is made of
    source: str = "corpora"  # corpora | folder:PATH | glue:PATH (empty PATH: the hub)

    def __post_init__(self):
        if self.level not in LEVELS:
            raise ValueError(f"task {self.name}: level {self.level!r}, expected one of {LEVELS}")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Texts and 0/1 labels of one task; the classes of a corpus task are of equal size."""

    train: Texts
    validation: Texts
    test: Texts


@dataclasses.dataclass(frozen=True)
class Caps:
    """Largest number of texts per class, by split."""

    train: int = 400
    validation: int = 100
    test: int = 200


def describe(domain: str, class_descriptions: tuple[str, str]) -> str:
    """The written description of a task, the same form for every source."""
    return (
        f"Tell two classes of {domain} apart. "
        f"Class 0: {class_descriptions[0]} Class 1: {class_descriptions[1]}"
    )


def slug(text: str) -> str:
    """``text`` in lower-case letters, digits and "_"."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text).strip("_").lower()


def split_of(unit: str) -> str:
    """Split of a unit (a text's opening or a document): the same in every task and corpus."""
    place = _digest("split", unit) / 2**64
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def shuffled(items: list[str]) -> list[str]:
    """``items`` in an order that depends on their contents alone."""
    return sorted(items, key=lambda item: (_digest("order", item), item))


def _digest(purpose: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"jlora {purpose}|{text}".encode()).digest()[:8], "big")


def balanced(zero: list[str], one: list[str], cap: int) -> Texts:
    """The first n of each list in turn (0, 1, 0, 1, ...), n = min(cap, both lengths)."""
    n = min(cap, len(zero), len(one))
    texts = [text for pair in zip(zero[:n], one[:n], strict=True) for text in pair]
    return texts, np.tile(np.arange(2, dtype=np.int32), n)
