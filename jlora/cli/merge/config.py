"""The configuration of a merge: YAML in mergekit's manner, checked, and read for each site.

    merge_method: ties                 # a row of `jlora.merging.METHODS`
    base_model: path/to/hf             # a directory of safetensors; see below
    models:
      - model: path/to/adapter         # a PEFT directory, or an Orbax checkpoint of `jl.io`
        parameters:
          weight: 0.5                  # a number,
          density: [0.2, 0.8]          # a gradient from the first layer to the last,
      - model: another
        parameters:
          weight:                      # or the first entry whose filter is part of the site's name
            - {filter: self_attn, value: [0.1, 0.9]}
            - {value: 0.5}
    parameters: {rank: 16}             # options of the method; numbers may be as above
    names: llama                       # site names of Orbax checkpoints: bert, llama, vit, vit4
    prefix: ""                         # of module names, in front of those of the base
    missing: error                     # or zero: adapters without a site add nothing there
    seed: 0                            # of randomised methods
    out: {path: merged, format: peft, rank: 8, dtype: float32}    # format: peft, orbax or merged

Sites are called `<module>/kernel`, and looked-up tables `<module>/embedding`; convolutions and
tables are merged as matrices are, see `layout`. A base is needed to write merged weights, to
convert adapters whose delta depends on the weight, and to read adapters other than LoRA, or with
the base's table or head beside them. `weight` of no model means 1/N each; `normalize: true` among
the `parameters` divides the weights of a site by their sum. A filter that no site is left for is
an error.

Source: our reading of mergekit's format.
Deviates: no slices, tokenizers or chat templates; names that are unknown are errors.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora import io
from jlora.io import NameMap
from jlora.io.names import near

FORMATS = ("peft", "orbax", "merged")
DTYPES = ("float32", "bfloat16", "float16")
PLAIN = NameMap({r"(.+)/(?:kernel|embedding)": r"\1"})  # sites that are called as the torch modules
NAMES = {"bert": io.bert, "llama": io.llama, "vit": io.vit, "vit4": io.vit4}
LAYER = re.compile(r"(?:^|[./_])(\d+)(?=[./_]|$)")


@dataclasses.dataclass(frozen=True)
class Model:
    """One adapter."""

    path: Path
    parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Out:
    """What is written."""

    path: Path | None
    format: str = "peft"
    rank: int | None = None  # cut to this rank
    dtype: str | None = None  # of the arrays; None: float32, or for merged weights the base's


@dataclasses.dataclass(frozen=True)
class Config:
    """A merge."""

    method: str
    models: tuple[Model, ...]
    base: Path | None
    parameters: Mapping[str, Any]
    names: NameMap
    missing: str
    seed: int
    out: Out


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key, got and expected."""


def parse(data: Any, folder: Path = Path(".")) -> Config:
    """A configuration from what YAML gives; relative paths are those from `folder`."""
    top = _keys(data, "the configuration", ("merge_method", "models"), (
        "base_model", "parameters", "names", "prefix", "missing", "seed", "out",
    ))  # fmt: skip
    if not isinstance(top["models"], list) or not top["models"]:
        raise ConfigError(f"models: got {top['models']!r}, expected a list of at least one")
    models = []
    for k, entry in enumerate(top["models"]):
        entry = _keys(entry, f"models[{k}]", ("model",), ("parameters",))
        path = folder / _text(entry["model"], f"models[{k}].model")
        models.append(Model(path, _parameters(entry.get("parameters"), f"models[{k}].parameters")))
    out = _keys(top.get("out") or {}, "out", (), ("path", "format", "rank", "dtype"))
    _one_of(out.get("format", "peft"), FORMATS, "out.format")
    _one_of(out.get("dtype"), (None, *DTYPES), "out.dtype")
    _one_of(top.get("missing", "error"), ("error", "zero"), "missing")
    for where, value in (("out.rank", out.get("rank")), ("seed", top.get("seed", 0))):
        if value is not None and (type(value) is not int or value < (where == "out.rank")):
            raise ConfigError(f"{where}: got {value!r}, expected a whole number")
    base = top.get("base_model")
    return Config(
        _text(top["merge_method"], "merge_method"),
        tuple(models),
        None if base is None else folder / _text(base, "base_model"),
        _parameters(top.get("parameters"), "parameters"),
        _names(top.get("names"), _text(top.get("prefix", ""), "prefix")),
        top.get("missing", "error"),
        top.get("seed", 0),
        Out(folder / _text(out["path"], "out.path") if "path" in out else None,
            out.get("format", "peft"), out.get("rank"), out.get("dtype")),
    )  # fmt: skip


def layer_of(path: str) -> int | None:
    """The layer that a site's name says: its first number."""
    found = LAYER.search(path)
    return int(found[1]) if found else None


def resolve(value: Any, where: str, path: str, place: float | None) -> Any:
    """A parameter at a site: `value` as the configuration has it, `place` in 0..1 of its layer."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        for entry in value:
            entry = _keys(entry, where, ("value",), ("filter",))
            if entry.get("filter") in (None, "*") or str(entry["filter"]) in path:
                return resolve(entry["value"], where, path, place)
        raise ConfigError(f"{where}: no filter matches the site {path}; add an entry without one")
    if isinstance(value, list):
        if not value or not all(_number(v) for v in value):
            raise ConfigError(f"{where}: got {value!r}, expected numbers")
        if place is None:
            raise ConfigError(f"{where}: a gradient, but {path} has no layer; use a filter")
        return float(np.interp(place * (len(value) - 1), range(len(value)), value))
    return value


def check_filters(value: Any, where: str, paths: Sequence[str]) -> None:
    """Raises ConfigError for a filter of a parameter that no site is left for."""
    if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
        return
    left = list(paths)
    for entry in value:
        entry = _keys(entry, where, ("value",), ("filter",))
        word = entry.get("filter")
        taken = [path for path in left if word in (None, "*") or str(word) in path]
        if word not in (None, "*") and not taken:
            why = "is part of no site's name (it is plain text, no regular expression)"
            if any(str(word) in path for path in paths):
                why = "has no site left: earlier entries took them"
            raise ConfigError(
                f"{where}: the filter {word!r} {why}; nearest: {near(str(word), paths)}"
            )
        check_filters(entry["value"], where, taken)
        left = [path for path in left if path not in taken]


def _parameters(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{where}: got {value!r}, expected names and values")
    return dict(value)


def _names(value: Any, prefix: str) -> NameMap:
    if value is None:
        return PLAIN.replace(prefix=prefix)
    if isinstance(value, Mapping):
        return NameMap({str(k): str(v) for k, v in value.items()}, prefix)
    _one_of(value, tuple(NAMES), "names")
    named = NAMES[value]()
    return named.replace(prefix=prefix + named.prefix)


def _keys(data: Any, where: str, owed: tuple[str, ...], free: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: got {data!r}, expected keys {owed + free}")
    for key in owed:
        if key not in data:
            raise ConfigError(f"{where}: lacks {key!r}")
    for key in data:
        if key not in owed + free:
            raise ConfigError(f"{where}: got key {key!r}, expected one of {owed + free}")
    return dict(data)


def _one_of(value: Any, allowed: tuple, where: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{where}: got {value!r}, expected one of {allowed}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: got {value!r}, expected text")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
