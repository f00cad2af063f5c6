"""The one error of everything that reads or writes files."""

from __future__ import annotations

import os


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
