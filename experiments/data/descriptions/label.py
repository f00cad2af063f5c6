"""The human words for one label."""

from typing import NamedTuple


class Label(NamedTuple):
    """Human words for one label."""

    name: str  # a short noun phrase
    description: str  # one sentence
    paraphrases: tuple[str, str]  # the same in other words
