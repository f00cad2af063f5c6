"""Which folders `--overwrite` may replace: those that this command wrote, as it wrote them.

A folder is recognised by `MARKER` inside it, which lists what was written. A folder without one, or
with other files besides (notes, a repository, an adapter that was trained on top), a link, and any
folder in which an input of the merge lies are left alone.

Deviates: nothing.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from jlora.cli.merge.base import MARKER
from jlora.io import FormatError, whole_file
from jlora.io.json_file import parse_json


def mark(folder: Path) -> None:
    """Writes the marker of a folder that is complete.

    Args:
      folder: the folder.
    """
    record = {"written_by": "python -m jlora.merge", "files": sorted(_files(folder))}
    whole_file.write_bytes(folder / MARKER, (json.dumps(record, indent=1) + "\n").encode())


def check(folder: Path, inputs: Iterable[Path]) -> None:
    """Refuses to replace a folder with which anything but our own output would be lost.

    Args:
      folder: what is to be replaced; it exists.
      inputs: files and folders that the merge reads.

    Raises:
      FormatError: it is a link or a file, holds an input or a file that an input links to, or is
        not what the marker inside says.
    """
    if folder.is_symlink() or not folder.is_dir():
        kind = "a symbolic link" if folder.is_symlink() else "no folder"
        raise FormatError(folder, f"got {kind}, expected a folder that this command wrote")
    place = folder.resolve()
    for path in inputs:
        inner = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else []
        for part in (path, *inner):
            if part.resolve().is_relative_to(place):
                raise FormatError(folder, f"holds the input {part}; choose another target")
    marker = folder / MARKER
    if not marker.is_file():
        raise FormatError(
            folder,
            f"was not written by this command (it has no {MARKER}), and --overwrite does not "
            "replace it; delete it yourself, or choose another target",
        )
    record = parse_json(marker, marker.read_bytes())
    listed = record.get("files") if isinstance(record, dict) else None
    if not isinstance(listed, list):
        raise FormatError(marker, "lacks the list of files")
    strange = sorted(_files(folder) - {str(name) for name in listed} - {MARKER})
    if strange:
        raise FormatError(
            folder,
            f"holds files that this command did not write: {strange[:4]}; move them, or choose "
            "another target",
        )


def _files(folder: Path) -> set[str]:
    """Everything below a folder but folders, by relative names; links are not followed."""
    inside = set()
    for base, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        inside |= {os.path.relpath(os.path.join(base, n), folder) for n in (*names, *links)}
    return inside
