"""GGUF files through the ``gguf`` package, which is an extra; damaged ones are one error.

Reference: the GGUF specification of the ggml project, version 3.
Deviates: a count or a length that points past the end of the file is an error; the package itself
would read empty arrays from there, as many as the file says.
"""

import os

import numpy as np

from jlora.io.errors import FormatError
from jlora.types import Dynamic

DAMAGED = (
    ValueError, KeyError, IndexError, OSError, OverflowError, TypeError, MemoryError,
    RecursionError, UnicodeDecodeError, AttributeError,
)  # fmt: skip


def open_gguf(path: str | os.PathLike[str]) -> Dynamic:
    """Opens a file; its tensors are mapped into memory, not read.

    Args:
      path: the ``.gguf`` file.

    Returns:
      A ``gguf.GGUFReader``.

    Raises:
      FormatError: no such file, or not a GGUF file that can be read.
    """
    try:
        return _reader()(os.fspath(path))
    except DAMAGED as error:
        raise FormatError(path, f"not a GGUF file that can be read ({error})") from error


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as GGUF files do.

    Args:
      path: a file.

    Returns:
      False for directories and files that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def field(
    path: str | os.PathLike[str], reader: Dynamic, name: str, default: Dynamic = None
) -> Dynamic:
    """A value of the header.

    Args:
      path: the file, for errors.
      reader: of `open_gguf`.
      name: such as ``general.architecture``.
      default: where the file lacks it; None: that is an error.

    Returns:
      The value: a number, a string, or a list.

    Raises:
      FormatError: it is missing or damaged.
    """
    entry = reader.get_field(name)
    if entry is None and default is None:
        raise FormatError(path, f"{name}: missing")
    try:
        return default if entry is None else entry.contents()
    except DAMAGED as error:
        raise FormatError(path, f"{name}: damaged ({error})") from error


def _reader() -> type:
    """The package's reader, which stops at the end of the file; the package is needed only here."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            size = int(offset) + np.dtype(dtype).itemsize * int(count)
            if size > len(self.data):
                raise ValueError(f"byte {size} of {len(self.data)} is needed")
            return super()._get(offset, dtype, count, override_order)

    return Reader
