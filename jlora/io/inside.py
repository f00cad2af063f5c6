"""The one place where a file name that a file holds becomes a path: it stays inside its folder.

The names of shards in an index, of members in an archive, of files in a manifest are untrusted.
Joined as they are, ``/etc/x``, ``../x``, ``C:\\x`` or ``link/x`` (a symbolic link to elsewhere)
name files outside of the folder, which would be read, or overwritten.

Deviates: the last part of a name may be a symbolic link to a file elsewhere, where it is read: the
cache of Hugging Face consists of such links. Writing replaces links, and never follows them.
"""

from __future__ import annotations

import os
from pathlib import Path

from jlora.io.errors import FormatError
from jlora.types import Json


def inside(folder: str | os.PathLike[str], name: Json, source: str | os.PathLike[str]) -> Path:
    """The path of the file `name` in `folder`.

    Args:
      folder: where the file belongs; its own links are followed.
      name: what a file says, ``a.safetensors`` or ``part/a.safetensors``; of any type.
      source: the file that says so, named in errors.

    Returns:
      ``folder / name``.

    Raises:
      FormatError: `name` is no text, is empty, absolute or of Windows' form, has a part that is
        empty, ``.`` or ``..`` or a character that does not print, or a folder on its way is a link
        that leaves `folder`.
    """
    expected = f"expected the plain name of a file inside {os.fspath(folder)}"
    if not isinstance(name, str) or not name.isprintable() or len(name) > 1024:
        raise FormatError(source, f"got the file name {str(name)[:80]!r}, {expected}")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in parts[0]:
        raise FormatError(source, f"got the file name {name!r}, {expected}")
    path = Path(folder, *parts)
    if not path.parent.resolve().is_relative_to(Path(folder).resolve()):
        raise FormatError(source, f"got the file name {name!r}, which leaves by a link, {expected}")
    return path
