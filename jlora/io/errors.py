"""The one error of everything that reads or writes files, and what it says of their keys."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable


class FormatError(ValueError):
    """A file, or what it says, is not what it must be; nothing of it was used.

    Args:
      source: the file or directory at fault.
      why: what was got and what was expected.
    """

    def __init__(self, source: str | os.PathLike[str], why: str):
        super().__init__(f"{os.fspath(source)}: {why}")
        self.source = os.fspath(source)
        self.why = why

    def __reduce__(self):
        return type(self), (self.source, self.why)


def keys_seen(keys: Iterable[str], n: int = 3) -> str:
    """What a file has instead of what was looked for.

    Args:
      keys: of the file.
      n: how many are shown; 3, for one line.

    Returns:
      Text such as "its 12 keys are such as [...]".
    """
    names = sorted(keys)
    if not names:
        return "it has no tensors at all"
    return f"its {len(names)} keys are such as {[key[:80] for key in names[:n]]}"


def near(word: str, words: Iterable[str], n: int = 3) -> list[str]:
    """Words that look like another one, for error messages.

    Args:
      word: what was got.
      words: what is known; the first 2000 are looked at.
      n: how many at most; 3, for one line.

    Returns:
      The most similar first; [] where none is.
    """
    return difflib.get_close_matches(
        word[:200], [w[:200] for w in itertools.islice(words, 2000)], n, 0.3
    )
