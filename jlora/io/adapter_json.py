"""Sites and methods of an adapter as JSON, as checkpoints and exported functions hold them.

A method is its type and its fields. Only methods of `jlora.methods` are read back, by name: no
other module is ever imported. What is read is untrusted, and every field of a site is checked.

Original to jlora.
Deviates: nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from jlora import methods
from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Site
from jlora.io.errors import FormatError
from jlora.types import Json

FIELDS = {  # of a site's description, with what each must be
    "path": "text",
    "shape": "a list of sizes",
    "kinds": "letters of 's', 'i', 'o'",
    "dtype": "the name of a dtype",
    "ops": "a list of names",
    "flops": "a whole number",
    "group": "text",
    "method": "a type and its fields",
}

Sites = tuple[tuple[Site, Method], ...]


def site_json(folder: Path, site: Site, method: Method) -> dict[str, Json]:
    """The description of one site.

    Args:
      folder: where it goes, for errors.
      site: the site.
      method: its method.

    Returns:
      What JSON can hold.

    Raises:
      FormatError: a hyper-parameter cannot be written as JSON.
    """
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


def sites_of(folder: Path, entries: Json) -> Sites:
    """Sites and methods by their description, of the library's methods only.

    Args:
      folder: where it is from, for errors.
      entries: read from JSON: a list, of any content.

    Returns:
      (site, method) of each entry.

    Raises:
      FormatError: it is not such a description.
    """
    try:
        return read_sites(folder, entries, None)
    except FormatError:
        raise
    except Exception as error:  # whatever a method says of fields that it does not have
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(folder, f"damaged description of sites: {first[:200]}") from error


def _site(folder: Path, number: int, entry: Json) -> Site:
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


def read_sites(folder: Path, entries: Json, like: Adapter | None) -> Sites:
    """Sites and methods by their description, which may be of another adapter.

    Args:
      folder: where it is from, for errors.
      entries: read from JSON: a list, of any content.
      like: an adapter whose sites and methods they must be, of any module; None: of the library's.

    Returns:
      (site, method) of each entry.

    Raises:
      FormatError: it is not such a description, or of another adapter.
      Exception: whatever a method raises for fields that it does not have; `sites_of` catches it.
    """
    if not isinstance(entries, list):
        raise FormatError(folder, f"sites: got {type(entries).__name__}, expected a list")
    rows = []
    for number, entry in enumerate(entries):
        site = _site(folder, number, entry)
        if like is None:
            rows.append((site, _from_json(folder, entry["method"])))
            continue
        if number >= len(like.sites):
            raise FormatError(folder, f"has {len(entries)} sites, expected {len(like.sites)}")
        expected, method = like.sites[number]
        if dataclasses.replace(expected, dtype=jnp.dtype(expected.dtype)) != site:
            raise FormatError(folder, f"site {number}: got {site}, expected {expected}")
        _check_method(folder, site.path, entry["method"], method)
        rows.append((expected, method))
    if like is not None and len(entries) != len(like.sites):
        raise FormatError(folder, f"has {len(entries)} sites, expected {len(like.sites)}")
    return tuple(rows)


def _check_method(folder: Path, path: str, got: dict[str, Json], method: Method) -> None:
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


def _to_json(folder: Path, value: Json) -> Json:
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


def _from_json(folder: Path, value: Json) -> Json:
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
