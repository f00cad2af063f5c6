"""METADATA of golden files: where they come from, and their hashes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def write(folder: Path, lines: Iterable[str], files: Iterable[Path]) -> None:
    """Writes `folder`/METADATA: the lines, then the sha256 of every file."""
    hashes = [
        f"  {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}"
        for path in sorted(files)
    ]
    (folder / "METADATA").write_text("\n".join([*lines, "sha256:", *hashes]) + "\n")


def everything(folder: Path) -> list[Path]:
    """All files of a folder but METADATA."""
    return [p for p in folder.rglob("*") if p.is_file() and p.name != "METADATA"]
