"""Files read whole and written whole: no pickles, no pipes, never half of one.

Deviates: nothing.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jlora.io.errors import FormatError

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".msgpack"}


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The content of one regular file.

    Args:
      path: the file; names of pickles are refused.
      max_bytes: longer files are refused unread.

    Returns:
      All of it.

    Raises:
      FormatError: not a regular file, too long, or it changed while it was read.
    """
    with regular(path) as (file, size):
        if size > max_bytes:
            raise FormatError(path, f"{size} bytes, more than the limit of {max_bytes}")
        data = file.read(size + 1)
    if len(data) != size:
        raise FormatError(path, "changed while it was read")
    return data


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a temporary file next to `path` and renames it: readers see the old or the new one.

    Args:
      path: the file; its directory exists.
      data: its content.

    Raises:
      OSError: of the file system; `path` is as it was.
    """
    folder, name = os.path.split(os.fspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def regular(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], int]]:
    """A regular file that is not a pickle, open for reading.

    Args:
      path: the file.

    Yields:
      (the open file, its size in bytes).

    Raises:
      FormatError: the name of a pickle, not a regular file, or it cannot be read.
    """
    if Path(path).suffix.lower() in PICKLES:
        raise FormatError(path, "pickles and the like can run code; convert it to .safetensors")
    try:
        # O_NONBLOCK: opening a pipe somebody put there must not hang.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            os.close(handle)
            raise FormatError(path, "not a regular file")
        with os.fdopen(handle, "rb") as file:
            yield file, info.st_size
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"cannot be read ({error})") from error
