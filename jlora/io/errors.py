"""The one error of everything that reads or writes files, and what it says of their keys."""

from __future__ import annotations

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
    """What a file has instead of what was looked for: "its 12 keys are such as [...]"."""
    found = sorted(keys)
    if not found:
        return "it has no tensors at all"
    return f"its {len(found)} keys are such as {[key[:80] for key in found[:n]]}"
