"""Adapters and banks as Orbax checkpoints, with what they are written alongside the arrays.

A checkpoint is a directory that Orbax commits by renaming it: it is there whole or not at all. It
holds every array (sharded ones by their shards) and a JSON description: sites, methods with their
hyper-parameters, and name, shape, dtype and CRC-32 of every array. `restore_adapter` checks all of
it, and what `like` expects, before it returns anything.

Original to jlora; the directory is Orbax's own format.
Deviates: Orbax keeps arrays under their tree paths; here under numbers, as site paths have slashes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jlora.core.adapter import Adapter
from jlora.io.adapter_json import read_sites, site_json
from jlora.io.errors import FormatError
from jlora.types import Dynamic, Json

VERSION = 1
PARTS = ("trainable", "frozen")
CONTENTS = {  # of a checkpoint: what Orbax writes, and the merge command
    *("arrays", "meta", "_CHECKPOINT_METADATA", "commit_success.txt", "descriptor"),
    "jlora_merge.json",
}
Names = list[tuple[str, str, str]]  # (part, site path or group, array name), in order of their keys


def save_adapter(
    path: str | os.PathLike[str], adapter: Adapter, *, overwrite: bool = False
) -> None:
    """Writes an adapter or a bank; returns when it is committed.

    Args:
      path: the directory, which Orbax makes.
      adapter: its arrays may be sharded.
      overwrite: delete the checkpoint at `path` first. False: one that is there is an error.

    Raises:
      FormatError: `path` exists; with `overwrite`, it is not what this function writes (a folder
        with anything else inside, a link) and is kept; the adapter has no sites; a hyper-parameter
        cannot be written as JSON.
    """
    folder = Path(path).absolute()
    if not adapter.sites:
        raise FormatError(folder, "an adapter without sites changes nothing; got 0, expected some")
    if os.path.lexists(folder) and not overwrite:
        raise FormatError(folder, "exists already")
    _check_replaceable(folder)
    names = _names({part: getattr(adapter, part) for part in PARTS})
    arrays = {_key(n): getattr(adapter, p)[site][name] for n, (p, site, name) in enumerate(names)}
    meta = {
        "version": VERSION,
        "sites": [site_json(folder, site, method) for site, method in adapter.sites],
        "arrays": [
            {"name": list(name), **_form(arrays[_key(n)]), "crc32": _crc(arrays[_key(n)])}
            for n, name in enumerate(names)
        ],
    }
    meta["crc32"] = _crc_json(meta)
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        meta=ocp.args.JsonSave(meta),  # type: ignore[call-arg]
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=args, force=overwrite)


def restore_adapter(path: str | os.PathLike[str], like: Adapter | None = None) -> Adapter:
    """Reads what `save_adapter` wrote.

    Args:
      path: the directory.
      like: what to expect: sites, methods, shapes and dtypes must agree (hyper-parameters that live
        on
        as data, such as alpha, may differ). Its arrays (or `jax.ShapeDtypeStruct`) say where the
        result
        goes; None: all goes to the default device. Required for methods that are not in
        `jlora.methods`.

    Returns:
      The adapter or bank.

    Raises:
      FormatError: missing, unfinished, damaged or something else than `like`; names path, got and
        expected.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise FormatError(folder, "no such checkpoint directory")
    try:
        return _restore(folder, like)
    except FormatError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever their layers do.
        first = str(error).strip().splitlines()[:1]
        raise FormatError(folder, f"damaged or unfinished checkpoint: {first}") from error


def _check_replaceable(folder: Path) -> None:
    """FormatError where something else than a checkpoint of an adapter would be deleted."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FormatError(folder, "is a link or a file, expected a checkpoint; it is kept")
    strange = sorted({p.name for p in folder.iterdir()} - CONTENTS)
    whole = all((folder / name).is_dir() for name in ("arrays", "meta"))
    if strange or not whole:
        names = strange[:4] or sorted(p.name for p in folder.iterdir())
        raise FormatError(folder, f"got {names} inside, expected a checkpoint only; it is kept")


def _restore(folder: Path, like: Adapter | None) -> Adapter:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())  # type: ignore[call-arg]
        meta = checkpointer.restore(folder, args=args)["meta"]
        if not isinstance(meta, dict) or meta.get("version") != VERSION:
            raise FormatError(folder, "no description of version 1 inside")
        if meta.pop("crc32", None) != _crc_json(meta):
            raise FormatError(folder, "the description is damaged: its crc32 differs")
        entries = meta["arrays"]
        names: Names = [tuple(entry["name"]) for entry in entries]
        if len(set(names)) != len(names) or any(part not in PARTS for part, _, _ in names):
            raise FormatError(folder, "the description names arrays twice or elsewhere")
        sites = read_sites(folder, meta["sites"], like)
        known = {site.path for site, _ in sites} | {site.group for site, _ in sites}
        if not {site for _, site, _ in names} <= known:
            raise FormatError(folder, "the description has arrays of sites that it does not list")
        wanted = _abstract(folder, entries, names, like)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))  # type: ignore[call-arg]
        arrays = checkpointer.restore(folder, args=args)["arrays"]
    parts: dict[str, dict[str, dict[str, jax.Array]]] = {part: {} for part in PARTS}
    for n, (part, site, name) in enumerate(names):
        array = arrays[_key(n)]
        stored = {**_form(array), "crc32": _crc(array)}
        for what, expected in entries[n].items():
            if what != "name" and stored[what] != expected and None not in (expected, stored[what]):
                raise FormatError(
                    folder, f"{part} {site}/{name}: {what} {stored[what]}, expected {expected}"
                )
        parts[part].setdefault(site, {})[name] = array
    for site, _ in sites:
        for part in PARTS:
            parts[part].setdefault(site.path, {})
    return Adapter(parts["trainable"], parts["frozen"], sites)


def _names(parts: Mapping[str, Mapping[str, Mapping[str, Json]]]) -> Names:
    return [
        (part, site, name)
        for part in PARTS
        for site in sorted(parts[part])
        for name in sorted(parts[part][site])
    ]


def _key(number: int) -> str:
    return f"{number:06d}"


def _form(array: Dynamic) -> dict[str, Json]:
    return {"shape": list(array.shape), "dtype": jnp.dtype(array.dtype).name}


def _crc_json(meta: dict[str, Json]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _crc(array: Dynamic) -> int | None:
    """CRC-32 of the bytes; None where other processes hold some of them."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(np.asarray(array)).tobytes())


def _abstract(folder: Path, entries: list, names: Names, like: Adapter | None) -> dict[str, Json]:
    """What Orbax is to restore, and where to."""
    if like is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return {
            _key(n): jax.ShapeDtypeStruct(
                tuple(entry["shape"]), jnp.dtype(entry["dtype"]), sharding=sharding
            )
            for n, entry in enumerate(entries)
        }
    expected = _names({part: getattr(like, part) for part in PARTS})
    if set(expected) != set(names):
        surplus, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
        raise FormatError(folder, f"surplus arrays {surplus[:4]}, missing arrays {missing[:4]}")
    wanted = {}
    for n, (part, site, name) in enumerate(names):
        leaf = getattr(like, part)[site][name]
        got = {key: entries[n][key] for key in ("shape", "dtype")}
        if got != _form(leaf):
            raise FormatError(folder, f"{part} {site}/{name}: got {got}, expected {_form(leaf)}")
        place = getattr(leaf, "sharding", None)
        place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted[_key(n)] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return wanted
