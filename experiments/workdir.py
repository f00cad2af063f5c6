"""Stage folders: keyed by a hash of the settings, committed last, verified when read.

A stage writes into `<workdir>/<stage>-<key>/` and commits it by a DONE.json (temp file + rename)
that lists every file with its size and sha256. A folder without DONE.json is unfinished work, a
file that no longer matches is an error. PyTrees are Orbax checkpoints (.npz by other processes).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.core.lift import path_string
from jlora.io import FormatError, json_file
from jlora.io.inside import inside

PyTree = Any
ALONE = "arrays.npz"  # in the folder of a tree that another process than 0 saved


class StageError(RuntimeError):
    """A stage's input is missing or damaged; the text says which file and what to do."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys through a temp file and a rename."""
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temp, path)


REDO = "delete the folder of this stage, it is then made again"  # remedy of `read_json`


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """The JSON value of a file that this program wrote.

    Args:
      path: the file. kind: dict or list, what must be in it. remedy: what to do when it is not.

    Raises:
      StageError: missing, no JSON or of another kind: one line with path, got and expected.
    """
    try:
        return json_file.read_json(path, kind, constants=True)  # a loss may be NaN
    except FormatError as error:
        raise StageError(f"{error}; {remedy}") from None


def save_array(path: Path, **arrays: np.ndarray) -> None:
    """Write a .npz file through a temp file and a rename."""
    temp = path.with_name(path.name + ".tmp")
    with temp.open("wb") as handle:
        named: dict[str, Any] = arrays
        np.savez(handle, **named)
    os.replace(temp, path)


def _checkpointer() -> ocp.StandardCheckpointer:
    """A checkpointer that no other process waits for: each saves its own pieces of work."""
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def save_tree(path: Path, tree: PyTree) -> None:
    """Commit the array leaves of any PyTree as one Orbax checkpoint folder (replacing it).

    Leaves are stored by their key path, so NamedTuples and optimizer states need no schema.
    """
    host = {k: np.asarray(v) for k, v in _named(tree).items()}
    if jax.process_index() > 0:
        _save_alone(path, host)
        return
    with _checkpointer() as saver:
        saver.save(path.absolute(), host, force=True)
        saver.wait_until_finished()


def _save_alone(path: Path, host: dict[str, np.ndarray]) -> None:
    """One .npz in the folder: Orbax writes arrays of the host in process 0 only."""
    temp = path.with_name(path.name + ".tmp")
    for old in (temp, path):
        shutil.rmtree(old, ignore_errors=True)
    temp.mkdir(parents=True)
    save_array(temp / ALONE, **host)
    os.replace(temp, path)


def steps_kept(folder: Path) -> list[Path]:
    """The checkpoints ``step_<n>`` of a folder by their number, which need not be there.

    A save that was killed leaves a folder whose name goes on after the number: it is none of them.
    """
    whole = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(whole, key=lambda path: int(path.name[5:]))


def load_tree(path: Path, like: PyTree) -> PyTree:
    """Read a PyTree of numpy arrays with the structure, shapes and dtypes of `like`.

    Raises StageError naming the folder when it is missing, damaged or of another shape.
    """
    if not path.is_dir():
        raise StageError(f"{path}: no checkpoint here; run the stage that writes it again")
    want = {k: np.zeros(v.shape, v.dtype) for k, v in _named(like).items()}
    try:
        if (path / ALONE).is_file():
            with np.load(path / ALONE) as file:
                got = dict(file)
        else:
            with _checkpointer() as saver:
                got = saver.restore(path.absolute(), want)
    except Exception as error:  # Orbax raises many kinds for a damaged folder
        text = str(error).splitlines()[0][:200] if str(error) else ""
        raise StageError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}: {text}); delete the"
            " folder and run its stage again"
        ) from error
    for name, leaf in want.items():
        if name not in got or got[name].shape != leaf.shape:
            shape = got[name].shape if name in got else "nothing"
            raise StageError(f"{path}: {name}: expected shape {leaf.shape}, got {shape}")
    return jax.tree.unflatten(jax.tree.structure(like), [np.asarray(got[k]) for k in want])


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {re.sub(r"[^A-Za-z0-9_]+", ".", path_string(k)): v for k, v in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves have the same name in a checkpoint, as 'a.b' and 'a-b' have")
    return named


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class Folder:
    """One stage's folder: `<workdir>/<name>-<key>`."""

    def __init__(self, workdir: Path, name: str, key: str):
        self.name = name
        self.path = workdir / f"{name}-{key}"

    @property
    def done(self) -> bool:
        """Whether the stage was committed."""
        return (self.path / "DONE.json").is_file()

    def open(self) -> Path:
        """Create the folder and return it."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def commit(self, info: dict[str, Any] | None = None) -> None:
        """Write DONE.json with every file's size and sha256: the stage is finished."""
        files = {}
        for file in sorted(p for p in self.path.rglob("*") if p.is_file()):
            files[str(file.relative_to(self.path))] = [file.stat().st_size, digest(file)]
        write_json(self.path / "DONE.json", {"files": files, "info": info or {}})

    def verify(self) -> dict[str, Any]:
        """Check the committed files and return the stage's info. Raises StageError."""
        marker = self.path / "DONE.json"
        if not marker.is_file():
            raise StageError(f"{self.path}: stage '{self.name}' is not finished; run it first")
        remedy = f"delete {self.path} and run '{self.name}' again"
        record = read_json(marker, dict, remedy)
        if not isinstance(record.get("info"), dict) or not _lists_files(record.get("files")):
            raise StageError(
                f"{marker}: got keys {sorted(record)}, expected 'files' {{name: [bytes, sha256]}}"
                f" and 'info' {{}}; {remedy}"
            )
        for name, (size, sha) in record["files"].items():
            try:
                file = inside(self.path, name, marker)
            except FormatError as error:
                raise StageError(f"{error}; delete {self.path} and run it again") from error
            if not file.is_file():
                raise StageError(f"{file}: missing; {remedy}")
            if file.stat().st_size != size or digest(file) != sha:
                raise StageError(
                    f"{file}: damaged (expected {size} bytes, sha256 {sha[:12]}…, got"
                    f" {file.stat().st_size} bytes); {remedy}"
                )
        return record["info"]

    def discard(self, *names: str) -> None:
        """Delete working files (progress checkpoints) inside the folder."""
        for name in names:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            elif target.exists():
                target.unlink()


Stage = Folder  # the name by which experiments.merging knows it


def _lists_files(value: Any) -> bool:
    """Whether `value` is {name: [size, sha256]}."""
    return isinstance(value, dict) and all(
        isinstance(v, list) and [type(x) for x in v] == [int, str] for v in value.values()
    )


def explain_failed_write(error: OSError | ValueError, workdir: Path) -> str | None:
    """One clear line for a failed write; None for a ValueError that is none.

    The writer of arrays below Orbax reports a full disk as a ValueError.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):
        return (
            f"the disk is full ({workdir}); finished stages are kept: free some space and run the"
            " same command again"
        )
    if isinstance(error, ValueError):
        return None
    return f"cannot write below {workdir}: {error}"
