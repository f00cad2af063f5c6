"""Adapters and banks as Orbax checkpoints, with what they are written alongside the arrays.

A checkpoint is a directory that Orbax commits by renaming it: it is there whole or not at all. It
holds every array (sharded ones by their shards) and a JSON description: sites, methods with their
hyper-parameters, and name, shape, dtype and CRC-32 of every array. `restore_adapter` checks all of
it, and what `like` expects, before it returns anything.

Original to jlora; the directory is Orbax's own format.
Deviates: Orbax keeps arrays under their tree paths; here under numbers, as site paths have slashes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jlora import methods
from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Site
from jlora.io.errors import FormatError

VERSION = 1
PARTS = ("trainable", "frozen")
CONTENTS = {  # of a checkpoint: what Orbax writes, and the merge command
    *("arrays", "meta", "_CHECKPOINT_METADATA", "commit_success.txt", "descriptor"),
    "jlora_merge.json",
}
FIELDS = {  # of a site's description, with what they must be
    "path": "text",
    "shape": "a list of sizes",
    "kinds": "letters of 's', 'i', 'o'",
    "dtype": "the name of a dtype",
    "ops": "a list of names",
    "flops": "a whole number",
    "group": "text",
    "method": "a type and its fields",
}
Names = list[tuple[str, str, str]]  # (part, site path or group, array name), in order of their keys


def save_adapter(
    path: str | os.PathLike[str], adapter: Adapter, *, overwrite: bool = False
) -> None:
    """Writes an adapter or a bank; returns when it is committed.

    Args:
      path: the directory, which Orbax makes.
      adapter: its arrays may be sharded.
      overwrite: delete the checkpoint at `path` first; else it is an error that one is there.

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
        "sites": [_site_json(folder, site, method) for site, method in adapter.sites],
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
        on as data, such as alpha, may differ). Its arrays (or `jax.ShapeDtypeStruct`) say where the
        result goes; without it all goes to the default device. Wanted for methods that are not in
        `jlora.methods`.

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
        found = strange[:4] or sorted(p.name for p in folder.iterdir())
        raise FormatError(folder, f"got {found} inside, expected a checkpoint only; it is kept")


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
        sites = _sites(folder, meta["sites"], like)
        known = {site.path for site, _ in sites} | {site.group for site, _ in sites}
        if not {site for _, site, _ in names} <= known:
            raise FormatError(folder, "the description has arrays of sites that it does not list")
        wanted = _abstract(folder, entries, names, like)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))  # type: ignore[call-arg]
        arrays = checkpointer.restore(folder, args=args)["arrays"]
    parts: dict[str, dict[str, dict[str, jax.Array]]] = {part: {} for part in PARTS}
    for n, (part, site, name) in enumerate(names):
        array = arrays[_key(n)]
        found = {**_form(array), "crc32": _crc(array)}
        for what, expected in entries[n].items():
            if what != "name" and found[what] != expected and None not in (expected, found[what]):
                raise FormatError(
                    folder, f"{part} {site}/{name}: {what} {found[what]}, expected {expected}"
                )
        parts[part].setdefault(site, {})[name] = array
    for site, _ in sites:
        for part in PARTS:
            parts[part].setdefault(site.path, {})
    return Adapter(parts["trainable"], parts["frozen"], sites)


def _names(parts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Names:
    return [
        (part, site, name)
        for part in PARTS
        for site in sorted(parts[part])
        for name in sorted(parts[part][site])
    ]


def _key(number: int) -> str:
    return f"{number:06d}"


def _form(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": jnp.dtype(array.dtype).name}


def _crc_json(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _crc(array: Any) -> int | None:
    """CRC-32 of the bytes; None where other processes hold some of them."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(np.asarray(array)).tobytes())


def _abstract(folder: Path, entries: list, names: Names, like: Adapter | None) -> dict[str, Any]:
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


# --- sites and methods as JSON ------------------------------------------------------------------


def _site_json(folder: Path, site: Site, method: Method) -> dict[str, Any]:
    return {
        "path": site.path,
        "shape": list(site.shape),
        "kinds": site.kinds,
        "dtype": jnp.dtype(site.dtype).name,
        "ops": list(site.ops),
        "flops": site.flops,
        "group": site.group,
        "method": _to_json(folder, method),
    }


def sites_of(folder: Path, entries: Any) -> tuple[tuple[Site, Method], ...]:
    """Sites and methods by their description, of the library's methods only.

    Raises:
      FormatError: it is none.
    """
    try:
        return _sites(folder, entries, None)
    except FormatError:
        raise
    except Exception as error:  # whatever a method says of fields that it does not have
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(folder, f"damaged description of sites: {first[:200]}") from error


def _site(folder: Path, number: int, entry: Any) -> Site:
    """One site; its fields are checked, as nothing later does."""
    where = f"site {number}"
    if not isinstance(entry, dict) or entry.keys() != FIELDS.keys():
        got = sorted(entry)[:9] if isinstance(entry, dict) else entry
        raise FormatError(folder, f"{where}: got {str(got)[:200]}, expected {sorted(FIELDS)}")
    shape, kinds, ops = (entry[key] for key in ("shape", "kinds", "ops"))
    good = {
        "path": isinstance(entry["path"], str),
        "shape": isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape),
        "kinds": isinstance(kinds, str) and set(kinds) <= {*"sio"},
        "dtype": isinstance(entry["dtype"], str),
        "ops": isinstance(ops, list) and all(isinstance(op, str) for op in ops),
        "flops": type(entry["flops"]) is int,
        "group": isinstance(entry["group"], str),
        "method": isinstance(entry["method"], dict),
    }
    for key, is_good in good.items():
        if not is_good:
            raise FormatError(
                folder, f"{where}: got {key} {str(entry[key])[:80]!r}, expected {FIELDS[key]}"
            )
    if len(kinds) != len(shape):
        raise FormatError(folder, f"{where}: got kinds {kinds!r}, expected one for each of {shape}")
    plain = {key: entry[key] for key in ("path", "kinds", "flops", "group")}
    return Site(shape=tuple(shape), ops=tuple(ops), dtype=jnp.dtype(entry["dtype"]), **plain)


def _sites(folder: Path, entries: Any, like: Adapter | None) -> tuple[tuple[Site, Method], ...]:
    if not isinstance(entries, list):
        raise FormatError(folder, f"sites: got {type(entries).__name__}, expected a list")
    found = []
    for number, entry in enumerate(entries):
        site = _site(folder, number, entry)
        if like is None:
            found.append((site, _from_json(folder, entry["method"])))
            continue
        if number >= len(like.sites):
            raise FormatError(folder, f"has {len(entries)} sites, expected {len(like.sites)}")
        expected, method = like.sites[number]
        if dataclasses.replace(expected, dtype=jnp.dtype(expected.dtype)) != site:
            raise FormatError(folder, f"site {number}: got {site}, expected {expected}")
        _check_method(folder, site.path, entry["method"], method)
        found.append((expected, method))
    if like is not None and len(entries) != len(like.sites):
        raise FormatError(folder, f"has {len(entries)} sites, expected {len(like.sites)}")
    return tuple(found)


def _check_method(folder: Path, path: str, got: dict[str, Any], method: Method) -> None:
    """Type and all fields that are compared; those that live on as data may differ."""
    expected = _to_json(folder, method)
    free = {field.name for field in dataclasses.fields(method) if not field.compare}
    forms = [{k: v for k, v in form["fields"].items() if k not in free} for form in (got, expected)]
    if got["type"] != expected["type"] or forms[0] != forms[1]:
        raise FormatError(folder, f"{path}: got method {got}, expected {expected}")


def _type_name(cls: type) -> str:
    """The name of a method in a checkpoint: "jlora.methods.lora:LoRA" wherever the file lies."""
    module = cls.__module__
    if module.startswith("jlora.methods."):
        module = f"jlora.methods.{module.rpartition('.')[2]}"  # rooms may be moved, names may not
    return f"{module}:{cls.__qualname__}"


def _to_json(folder: Path, value: Any) -> Any:
    if isinstance(value, Method):
        fields = {
            f.name: _to_json(folder, getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        return {"type": _type_name(type(value)), "fields": fields}
    if isinstance(value, tuple | list):
        return [_to_json(folder, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(folder, f"a hyper-parameter is {value!r}, which JSON cannot say")


def _from_json(folder: Path, value: Any) -> Any:
    """A method of the library; no other module is ever imported."""
    if isinstance(value, list):
        return tuple(_from_json(folder, item) for item in value)
    if not isinstance(value, dict):
        return value
    name = str(value["type"])
    known = {_type_name(cls): cls for cls in vars(methods).values() if isinstance(cls, type)}
    if name not in known:
        raise FormatError(folder, f"method {name!r} is not the library's; pass `like`")
    cls = known[name]
    return cls(**{k: _from_json(folder, v) for k, v in value["fields"].items()})
