"""An adapter to PEFT's tensors and config fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.io.errors import FormatError
from jlora.io.fused import check_whole
from jlora.io.model_sites import biased
from jlora.io.names import NameMap
from jlora.io.peft.read import BASE, ROOT, check_bias
from jlora.io.peft.table import Arrays, Fields, Table, check_site
from jlora.io.peft.tables import table_of
from jlora.types import Json, Tree


def torch_side(
    folder: Path, adapter: Adapter, names: NameMap, params: Tree
) -> tuple[Arrays, dict[str, Fields], Table]:
    """An adapter as PEFT has it.

    Args:
      folder: where it goes, for errors.
      adapter: of one method.
      names: from site paths to torch modules.
      params: the base parameters, to see that there are no biases where PEFT scales them; None:
        none
        given.

    Returns:
      (tensors by key, config fields by module, the table of the method).

    Raises:
      FormatError: several methods, a slice that the format cannot hold, or nothing to write.
      ValueError: a site has no name, two slices have the same, or an array lacks the stack axes.
    """
    table = _one_table(folder, adapter)
    biases = None if params is None else biased(flatten(params)[0])
    tensors: Arrays = {}
    fields: dict[str, Fields] = {}
    for site, method in adapter.sites:
        own, shared = ({k: np.asarray(v) for k, v in p.items()} for p in adapter.arrays(site))
        check_bias(folder, table, method, site.path, biases)
        for name, array in own.items():
            if array.shape[: len(site.stack)] != site.stack:
                raise ValueError(f"{site.path}/{name}: {array.shape}, expected {site.stack} first")
        for index in np.ndindex(*site.stack):
            part = {name: array[index] for name, array in own.items()}
            module = names.module(site.path, index)
            check_whole(site.path, module)
            try:
                check_site(table, site)
                written = table.write(method, site.slice(), {**shared, **part})
            except ValueError as error:
                raise FormatError(folder, f"{site.path}{list(index)}: {error}") from error
            if written is None:
                continue
            if module in fields:
                raise ValueError(f"name map: two slices are called {module!r}")
            fields[module] = written.fields
            own_tensors = written.tensors | (table.write_shared(shared) if table.copied else {})
            tensors.update({f"{ROOT}{module}.{k}": v for k, v in own_tensors.items()})
        if table.shared or table.families:
            tensors.update({f"{BASE}{k}": v for k, v in table.write_shared(shared).items()})
    if not fields:
        raise FormatError(folder, "all slices of the adapter are zero: nothing to write")
    return tensors, fields, table


def extra_tensors(
    folder: Path, extras: Mapping[str, Json], adapted: Mapping[str, Json], table: Table
) -> tuple[Arrays, Fields]:
    """Weights of the base model that go with an adapter.

    Args:
      folder: where they go, for errors.
      extras: by torch name, ``{"classifier.weight": [out, in], ...}``.
      adapted: the modules that the adapter changes.
      table: of the method.

    Returns:
      (tensors by key, the config fields that announce them).

    Raises:
      FormatError: one replaces a weight that the adapter changes, or biases where the type saves
        none.
    """
    modules = {name.rpartition(".")[0] for name in extras if not name.endswith(".bias")}
    tensors: Arrays = {}
    bias = "none"
    words = table.allowed.get("bias", (f"{table.type.lower()}_only",))  # AdaLoRA's is LoRA's
    only = next(word for word in words if word.endswith("_only"))
    for name, array in extras.items():
        module, _, leaf = name.rpartition(".")
        if module in adapted and leaf != "bias":
            raise FormatError(folder, f"{name!r} replaces a weight that the adapter changes")
        if module not in modules:
            bias = "all" if module not in adapted or bias == "all" else only
        inner = "base_layer." if module in adapted else ""
        tensors[f"{ROOT}{module}.{inner}{leaf}"] = np.asarray(array)
    declared: Fields = {"modules_to_save": sorted(modules) or None}
    if bias != "none":
        if "bias" not in table.free:
            raise FormatError(folder, f"PEFT's {table.type} saves no biases: {sorted(extras)[:4]}")
        declared["bias"] = bias
    return tensors, declared


def _one_table(folder: Path, adapter: Adapter) -> Table:
    tables: dict[int, tuple[Table, str]] = {}
    for _, method in adapter.sites:
        try:
            table = table_of(method)
        except ValueError as error:
            raise FormatError(folder, str(error)) from error
        tables[id(table)] = (table, type(method).__name__)
    if len(tables) != 1:
        kinds = sorted(kind for _, kind in tables.values())
        raise FormatError(folder, f"PEFT has one method for an adapter, got {kinds}")
    return next(iter(tables.values()))[0]
