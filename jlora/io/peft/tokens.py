"""Rows of embedding tables that PEFT trains: alone, or alongside the matrices of LoRA.

Alone they lie under ``<module>.trainable_tokens_delta`` [n, d_out] (new rows, in spite of the
name), and all tables have the same rows, those of the config's `token_indices`. With LoRA's
`trainable_token_indices` they lie under ``<module>.token_adapter.trainable_tokens_delta``, their
numbers in the config: a list for the one table, or ``{module: [..]}``.

Source: peft 0.21.2, its files.
Deviates: the config is written with whole module names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.io.errors import FormatError
from jlora.io.names import NameMap
from jlora.io.peft.read import ROOT, Modules, stacked
from jlora.io.peft.table import Arrays, Fields, Read, Table, want_shape
from jlora.io.peft.vera_oft_ia3 import ROWS, TOKENS
from jlora.methods.selective.trainable_tokens import TrainableTokens
from jlora.types import Dynamic, Json

FIELD, SUFFIX = "trainable_token_indices", ".token_adapter.trainable_tokens_delta"


def is_token_key(key: str) -> bool:
    """Whether a key is one of trained rows.

    Args:
      key: of a tensor in PEFT's file.

    Returns:
      False for keys of matrices.
    """
    return key.startswith(ROOT) and key.endswith(SUFFIX)


def taken(
    path: Path,
    config: Mapping[str, Json],
    tensors: Arrays,
    sites: Mapping[str, Site],
    modules: Modules,
) -> tuple[dict[str, Json], Arrays, dict[str, Read]]:
    """The trained rows in a file.

    Args:
      path: of the file, for errors.
      config: its fields.
      tensors: of the file, by key.
      sites: of the model, by path.
      modules: module -> (site path, stack index).

    Returns:
      (config without the rows, tensors without the rows, site path -> the rows).

    Raises:
      FormatError: rows without numbers or numbers without rows, of no table, not as many.
    """
    rows = {key[len(ROOT) : -len(SUFFIX)]: t for key, t in tensors.items() if is_token_key(key)}
    declared = config.get(FIELD)
    if not rows and declared is None:
        return dict(config), tensors, {}
    if isinstance(declared, list) and len(rows) == 1:
        declared = dict.fromkeys(rows, declared)
    if not isinstance(declared, dict):
        raise FormatError(
            path, f"{FIELD} = {repr(declared)[:80]} for the rows of {sorted(rows)[:4]}"
        )
    reads: dict[str, Read] = {}
    for name, ids in declared.items():
        hits = [module for module in rows if module == name or module.endswith(f".{name}")]
        if len(hits) != 1 or hits[0] not in modules:
            raise FormatError(
                path, f"{FIELD}: rows of {name[:80]!r} are {hits}, expected one table"
            )
        where, index = modules[hits[0]]
        if "gather" not in sites[where].ops or index or where in reads:
            raise FormatError(path, f"{FIELD}: {where} is no embedding table of its own")
        reads[where] = _read(path, sites[where], ids, rows[hits[0]])
    if len(reads) != len(rows):
        raise FormatError(
            path, f"{FIELD} names {sorted(declared)[:4]}, rows are of {sorted(rows)[:4]}"
        )
    rest = {key: t for key, t in tensors.items() if not is_token_key(key)}
    return {**config, FIELD: None}, rest, reads


def _read(path: Path, site: Site, ids: Dynamic, rows: np.ndarray) -> Read:
    whole = (
        isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < site.d_in for i in ids)
    )
    if not whole:
        raise FormatError(path, f"{FIELD} = {repr(ids)[:80]}, expected rows below {site.d_in}")
    try:
        want_shape(SUFFIX[1:], rows, (len(ids), site.d_out))
        return Read(TrainableTokens(tuple(ids)), {"rows": rows}, {})
    except ValueError as error:
        raise FormatError(path, str(error)) from error


def with_rows(
    path: Path, adapter: Adapter, sites: Mapping[str, Site], rows: Mapping[str, Read]
) -> Adapter:
    """The adapter with the rows as further sites.

    Args:
      path: of the file, for errors.
      adapter: of the matrices.
      sites: of the model, by path.
      rows: site path -> what was read.

    Returns:
      The adapter, sites sorted by path.

    Raises:
      FormatError: a table has both rows and a matrix.
    """
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    done = dict(adapter.sites)
    for where, read in rows.items():
        if where in trainable:
            raise FormatError(path, f"{where} has trained rows and another adapter")
        method, trainable[where], frozen[where] = stacked(path, sites[where], {(): read}, False)
        done[sites[where]] = method
    by_path = sorted(done.items(), key=lambda item: item[0].path)
    return Adapter(trainable, frozen, tuple(by_path)) if rows else adapter


def alone(
    path: Path, adapter: Adapter, names: NameMap
) -> tuple[Arrays, dict[str, Fields], Table] | None:
    """An adapter of trained rows as PEFT has it.

    Args:
      path: where it goes, for errors.
      adapter: of any sites.
      names: from site paths to torch modules.

    Returns:
      (tensors by key, config fields by module, the table); None of an adapter that has other sites.

    Raises:
      FormatError: rows of a weight that is not an embedding table of its own.
      ValueError: a table has no name.
    """
    if not adapter.sites or not all(isinstance(m, TrainableTokens) for _, m in adapter.sites):
        return None
    tensors: Arrays = {}
    fields: dict[str, Fields] = {}
    for site, method in adapter.sites:
        if site.stack or "gather" not in site.ops:
            raise FormatError(
                path, f"{site.path}: TrainableTokens, PEFT trains rows of embedding tables only"
            )
        module = names.module(site.path, ())
        tensors[f"{ROOT}{module}.{ROWS}"] = np.asarray(adapter.trainable[site.path]["rows"])
        fields[module] = {"token_indices": method.ids}  # type: ignore[union-attr]
    return tensors, fields, TOKENS


def split(adapter: Adapter, names: NameMap) -> tuple[Adapter, Arrays, dict[str, list[int]] | None]:
    """Takes the trained rows out of an adapter of matrices.

    Args:
      adapter: of any sites; one of rows alone is left as it is, as is one without rows.
      names: from site paths to torch modules.

    Returns:
      (the adapter without its rows, their tensors by key, their numbers by module or None).

    Raises:
      ValueError: rows of a weight that is not an embedding table of its own.
    """
    kept = tuple((s, m) for s, m in adapter.sites if not isinstance(m, TrainableTokens))
    if not kept or len(kept) == len(adapter.sites):
        return adapter, {}, None
    tensors: Arrays = {}
    declared: dict[str, list[int]] = {}
    for site, method in adapter.sites:
        if isinstance(method, TrainableTokens):
            if site.stack or "gather" not in site.ops:
                raise ValueError(f"{site.path}: PEFT trains rows of embedding tables only")
            module = names.module(site.path, ())
            tensors[f"{ROOT}{module}{SUFFIX}"] = np.asarray(adapter.trainable[site.path]["rows"])
            declared[module] = list(method.ids)
    return adapter.replace(sites=kept), tensors, declared
