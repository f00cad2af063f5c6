"""Adapters as PEFT's directories, `adapter_config.json` and `adapter_model.safetensors`, both ways.

Neither torch nor PEFT is needed. This file knows files and names; what the tensors of a method are
is in its `Table`. What is not understood is refused as a whole: no adapter is returned, no file
changed.

A stacked site is one torch module an index. Modules that a file leaves alone come back as zeros,
ranks that differ within a stack are padded with zeros (both are no adapter, and stay none under
gradient descent), and neither is written again: reading and writing is the identity, bitwise.

Source: peft 0.21.2, its files and its behaviour.
Deviates: target_modules lists whole module names; no README.md is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.adapter import Adapter, Method, Site
from jlora.io import peft_config, safetensors_file
from jlora.io.errors import FormatError
from jlora.io.names import NameMap, near
from jlora.io.peft_tables import Read, Table, table_for, table_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
Tensors = dict[str, np.ndarray]


def save_peft(
    path: str | os.PathLike[str],
    adapter: Adapter,
    names: NameMap,
    base_model_name: str | None = None,
    task_type: str | None = None,
    extras: Mapping[str, Any] | None = None,
) -> None:
    """Writes `adapter` as a directory that PEFT 0.21.2 loads.

    Args:
      path: the directory; made if missing, its two files replaced.
      adapter: one adapter, no bank; all sites of one method that PEFT knows.
      names: from site paths to torch modules.
      base_model_name: ``base_model_name_or_path`` of the config.
      task_type: such as ``"CAUSAL_LM"``.
      extras: weights of the base model to go with it (``modules_to_save``), by torch name:
        ``{"classifier.weight": [out, in], ...}``.

    Raises:
      FormatError: the files cannot say what the adapter is.
      ValueError: a site has no name, or the adapter is a bank.
    """
    folder = Path(path)
    tensors, fields, table = _torch_side(folder, adapter, names)
    common = {"base_model_name_or_path": base_model_name, "task_type": task_type}
    if extras:
        tensors.update({ROOT + name: np.asarray(array) for name, array in extras.items()})
        common["modules_to_save"] = sorted({name.rpartition(".")[0] for name in extras})
    config = peft_config.combine(folder / CONFIG, table, fields, common)
    data = safetensors_file.to_bytes(folder / WEIGHTS, tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_file.write_bytes(folder / WEIGHTS, data)
    safetensors_file.write_bytes(folder / CONFIG, peft_config.to_bytes(config))


def load_peft(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Any,
    extras: str = "refuse",
) -> Adapter:
    """Reads a directory that PEFT wrote.

    Args:
      path: the directory.
      names: from site paths to torch modules.
      params_or_sites: the sites of the model, as `jl.sites` gives them, or its parameters: then the
        rules of `names` tell the stack axes, and every leaf must be [*stack, in, out].
      extras: what to do with weights of the base model in the file (``modules_to_save``, biases):
        "refuse" the file, or "leave" them to `peft_extras`.

    Returns:
      The adapter, float arrays in the dtype of the file.

    Raises:
      FormatError: anything in the files that is not understood, damaged, missing or surplus.
      ValueError: `names` does not fit the sites.
    """
    folder = Path(path)
    config, table, tensors = _read_files(folder)
    reader = peft_config.Reader(folder / CONFIG, config, table)
    sites = {site.path: site for site in _sites(params_or_sites, names)}
    modules = names.table(sites.values())
    mine, rest = _by_module(tensors, table)
    _check_extras(folder, reader, rest, modules, extras)
    _check_modules(folder, reader, mine, modules, table)
    slices: dict[str, dict[tuple[int, ...], Read]] = {}
    for module, found in mine.items():
        where, index = modules[module]
        try:
            read = table.read(sites[where].slice(), found, reader.fields(module))
        except ValueError as error:
            raise FormatError(folder / WEIGHTS, f"{module}: {error}") from error
        slices.setdefault(where, {})[index] = read
    trainable, frozen, done = {}, {}, []
    for where in sorted(slices):
        method, trainable[where], frozen[where] = _join(folder, sites[where], slices[where], table)
        done.append((sites[where], method))
    return Adapter(trainable, frozen, tuple(done))


def peft_extras(path: str | os.PathLike[str]) -> Tensors:
    """Weights of the base model that an adapter's file brings along, by torch name.

    Returns:
      ``{"classifier.weight": [out, in], ...}``; empty for most adapters.
    """
    folder = Path(path)
    _, table, tensors = _read_files(folder)
    return {name.removeprefix(ROOT): t for name, t in _by_module(tensors, table)[1].items()}


def _read_files(folder: Path) -> tuple[dict[str, Any], Table, Tensors]:
    config = peft_config.read(folder / CONFIG)
    try:
        table = table_for(config)
    except ValueError as error:
        raise FormatError(folder / CONFIG, str(error)) from error
    if not (folder / WEIGHTS).exists():
        old = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise FormatError(folder, f"no {WEIGHTS}; got {old} (pickles are not opened: convert them)")
    return config, table, safetensors_file.read(folder / WEIGHTS)[0]


def _by_module(tensors: Tensors, table: Table) -> tuple[dict[str, Tensors], Tensors]:
    """Splits keys into module -> suffix -> tensor and those that are no part of the method."""
    suffixes = {suffix for layout in table.layouts for suffix in layout}
    mine: dict[str, Tensors] = {}
    rest: Tensors = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in suffixes if key.endswith(f".{s}")), None)
        if suffix is None or not key.startswith(ROOT):
            rest[key] = tensor
        else:
            mine.setdefault(key[len(ROOT) : -len(suffix) - 1], {})[suffix] = tensor
    return mine, rest


def _check_extras(folder, reader, rest, modules, extras) -> None:
    """Keys that are no adapter must be biases or `modules_to_save` that the config announces."""
    for key in rest:
        name = key.removeprefix(ROOT)
        bias = reader.config.get("bias", "none") != "none" and name.endswith(".bias")
        if not key.startswith(ROOT) or not (bias or reader.saved(name.rpartition(".")[0])):
            raise FormatError(folder / WEIGHTS, f"surplus tensor {key!r}")
    if rest and extras != "leave":
        raise FormatError(
            folder / WEIGHTS,
            f"replaces weights of the base model: {sorted(rest)[:4]}; load them with peft_extras "
            "and pass extras='leave'",
        )


def _check_modules(folder, reader, mine, modules, table) -> None:
    """Every module is known, targeted and whole, and none that is targeted lacks."""
    if not mine:
        raise FormatError(folder / WEIGHTS, f"no tensor of a {table.type} adapter")
    for module, found in mine.items():
        if module not in modules:
            raise FormatError(
                folder / WEIGHTS,
                f"module {module!r} is no site of this model and name map; nearest: "
                f"{near(module, modules) or 'none'}",
            )
        if not any(set(found) == set(layout) for layout in table.layouts):
            wanted = [list(layout) for layout in table.layouts]
            raise FormatError(
                folder / WEIGHTS, f"{module!r} has {sorted(found)}, expected one of {wanted}"
            )
        if not reader.targets(module):
            raise FormatError(folder / CONFIG, f"has tensors of {module!r}, which is no target")
    lacking = peft_config.absent(reader, modules, mine)
    if lacking:
        raise FormatError(folder / WEIGHTS, f"targets without tensors: {lacking[:4]}")


def _join(folder, site: Site, slices: Mapping[tuple[int, ...], Read], table: Table):
    """Slices of one site as (method, trainable, frozen) with leading stack axes."""
    top = max(slices.values(), key=lambda read: getattr(read.method, "rank", 0))
    method = top.method
    if len(slices) < np.prod(site.stack, dtype=int) and not table.sparse:
        raise FormatError(
            folder / WEIGHTS,
            f"{site.path}: only {sorted(slices)} of the stack {site.stack} are adapted, which "
            f"{type(method).__name__} cannot be on a stacked site; unroll the layers",
        )
    parts = []
    for kind in ("trainable", "frozen"):
        part = {}
        for name, like in getattr(top, kind).items():
            out = np.zeros((*site.stack, *like.shape), like.dtype)
            for index, read in slices.items():
                array = getattr(read, kind)[name]
                part_of = tuple(slice(0, n) for n in array.shape)
                axis = method.rank_axes.get(name)
                want = list(like.shape)
                if axis is not None:
                    want[axis] = array.shape[axis]
                if list(array.shape) != want or array.dtype != like.dtype:
                    raise FormatError(
                        folder / WEIGHTS,
                        f"{site.path}{list(index)} {name}: {array.dtype}{list(array.shape)}, other "
                        f"layers have {like.dtype}{list(like.shape)}",
                    )
                out[(*index, *part_of)] = array
            part[name] = _device(folder, name, out)
        parts.append(part)
    return method, *parts


def _device(folder, name: str, array: np.ndarray) -> jax.Array:
    if array.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
        raise FormatError(folder / WEIGHTS, f"{name} is {array.dtype}; needs jax_enable_x64")
    return jnp.asarray(array)


def _torch_side(folder: Path, adapter: Adapter, names: NameMap):
    """All tensors by key, all fields by module, and the one table of the adapter."""
    tensors: Tensors = {}
    fields: dict[str, dict[str, Any]] = {}
    tables: dict[int, tuple[Table, Method]] = {}
    for site, method in adapter.sites:
        table = table_of(method)
        tables[id(table)] = (table, method)
        own = {k: np.asarray(v) for k, v in adapter.arrays(site)[0].items()}
        depth = len(site.stack)
        for name, array in own.items():
            if array.shape[:depth] != site.stack:
                raise ValueError(f"{site.path}/{name}: {array.shape}, expected {site.stack} first")
        for index in np.ndindex(*site.stack):
            part = {name: array[index] for name, array in own.items()}
            module = names.module(site.path, index)
            try:
                made = table.write(method, site.slice(), part)
            except ValueError as error:
                raise FormatError(folder, f"{site.path}{list(index)}: {error}") from error
            if made is None:
                continue
            if module in fields:
                raise ValueError(f"name map: two slices are called {module!r}")
            fields[module] = made.fields
            tensors.update({f"{ROOT}{module}.{k}": v for k, v in made.tensors.items()})
    if len(tables) != 1:
        kinds = sorted(type(method).__name__ for _, method in tables.values())
        raise FormatError(folder, f"PEFT has one method for an adapter, got {kinds}")
    if not fields:
        raise FormatError(folder, "all slices of the adapter are zero: nothing to write")
    return tensors, fields, next(iter(tables.values()))[0]


def _sites(params_or_sites: Any, names: NameMap) -> list[Site]:
    """Sites as given, or read off parameters by the rules of the name map."""
    if isinstance(params_or_sites, Mapping):
        leaves = jax.tree_util.tree_leaves_with_path(params_or_sites)
        return [
            site
            for keys, leaf in leaves
            if (site := _guessed("/".join(str(k.key) for k in keys), leaf, names)) is not None
        ]
    sites: Iterable[Any] = params_or_sites
    return [item[0] if isinstance(item, tuple) else item for item in sites]


def _guessed(path: str, leaf: Any, names: NameMap) -> Site | None:
    stack = names.stack_axes(path)
    if stack is None:
        return None
    kinds = "s" * stack + "io"
    if len(leaf.shape) != len(kinds):
        raise ValueError(
            f"{path}: shape {tuple(leaf.shape)} is not [{stack} stack axes, in, out]; pass sites "
            "from jl.sites instead of parameters"
        )
    ops = ("gather",) if path.rpartition("/")[2] == "embedding" else ("dot",)
    return Site(path, tuple(leaf.shape), kinds, leaf.dtype, ops)
