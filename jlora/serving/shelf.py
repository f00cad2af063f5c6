"""Adapters on disk by name: PEFT directories of one folder, read when a request wants them.

A name comes from the network. It is a plain word that names a folder directly inside the shelf's
root; nothing of it, no link on its way and no file in it may lie elsewhere. Files are safetensors
and JSON, checked as a whole before anything is used; one that is damaged or of another model is an
error of the requests that name it and of no other.

The components of the adapters read last are kept in memory up to a number of bytes, so that an
adapter that left the pool comes back without its file.

Deviates: S-LoRA (arXiv:2311.03285) keeps all adapters in main memory; here those used last.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jlora.core.method import rank_of
from jlora.core.site import Site
from jlora.io.errors import FormatError
from jlora.io.names import NameMap
from jlora.io.peft.directory import CONFIG, WEIGHTS, load_peft
from jlora.serving.components import components

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Unknown(KeyError):
    """There is no adapter of that name."""

    def __str__(self):
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where adapters lie, and what they may be."""

    root: Path  # the folder of PEFT directories
    sites: tuple[Site, ...]  # that adapters may have
    names: NameMap  # to torch modules
    most: int = 64  # rank at most
    bytes: int = 2**30  # of components in memory


class Memory(NamedTuple):
    """Components read last; the first entry goes first."""

    kept: Mapping[str, Float[np.ndarray, "r N"]] = {}
    reads: int = 0  # of files, so far


def folder(shelf: Shelf, name: str) -> Path:
    """The directory of an adapter.

    Args:
      shelf: where adapters lie.
      name: of the adapter, untrusted.

    Returns:
      Its path, inside the root.

    Raises:
      Unknown: the name is no plain word, there is no such directory, or it, or a file that would be
        read, lies outside of the root.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Unknown(f"adapter {str(name)[:80]!r}: expected letters, digits, '.', '_' and '-'")
    root, path = shelf.root.resolve(), shelf.root / name
    for part in (path, path / CONFIG, path / WEIGHTS):
        if not part.exists() or not part.resolve().is_relative_to(root):
            raise Unknown(f"adapter {name!r}: not loaded, and no PEFT directory of that name")
    return path


def listed(shelf: Shelf) -> tuple[str, ...]:
    """The names of all adapters on the shelf; no weights are read.

    Args:
      shelf: where adapters lie.

    Returns:
      Names in order.
    """
    names = []
    with os.scandir(shelf.root) as entries:
        for entry in entries:
            if NAME.fullmatch(entry.name):
                try:
                    folder(shelf, entry.name)
                except Unknown:
                    continue
                names.append(entry.name)
    return tuple(sorted(names))


def read(shelf: Shelf, name: str) -> Float[np.ndarray, "r N"]:
    """The components of an adapter, from its files.

    Args:
      shelf: where adapters lie.
      name: of the adapter, untrusted.

    Returns:
      float32, one row per component of its rank.

    Raises:
      Unknown: as `folder`.
      ValueError: files that are damaged, of another model, of a method whose delta is no product,
        or of a rank that is too large; the message names the adapter and not its path.
    """
    path = folder(shelf, name)
    try:
        adapter = load_peft(path, shelf.names, shelf.sites)
        for site, method in adapter.sites:
            if rank_of(method) > shelf.most:
                raise ValueError(f"{site.path}: got rank {rank_of(method)}, expected at most "
                                 f"{shelf.most}")  # fmt: skip
        return components(adapter, shelf.sites)
    except FormatError as error:
        raise ValueError(f"adapter {name!r}: {Path(error.source).name}: {error.why}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"adapter {name!r}: {error}") from error


def fetch(shelf: Shelf, memory: Memory, name: str) -> tuple[Memory, Float[np.ndarray, "r N"]]:
    """The components of an adapter, from memory or from its files.

    Args:
      shelf: where adapters lie.
      memory: what was read before.
      name: of the adapter, untrusted.

    Returns:
      Another memory, with this adapter as its newest, and the components.

    Raises:
      Unknown: as `folder`.
      ValueError: as `read`.
    """
    kept, reads = dict(memory.kept), memory.reads
    if name in kept:
        adapter = kept.pop(name)
    else:
        adapter, reads = read(shelf, name), reads + 1
    kept[name] = adapter
    while len(kept) > 1 and sum(t.nbytes for t in kept.values()) > shelf.bytes:
        del kept[next(iter(kept))]
    return Memory(kept, reads), adapter


def forget(memory: Memory, name: str) -> Memory:
    """A memory without an adapter, whose files are read again when it is wanted.

    Args:
      memory: as it is.
      name: of the adapter; one that is not there is no error.

    Returns:
      Another memory.
    """
    return memory._replace(kept={k: t for k, t in memory.kept.items() if k != name})
