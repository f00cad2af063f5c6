"""LoRA adapters in the one-file format of diffusers (`pytorch_lora_weights.safetensors`).

Keys are ``<component>.<module>.lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r], with DoRA
``lora_magnitude_vector`` [out] as well; of convolutions as PEFT has them (`torch_layout`). The
fields of PEFT's config, each under ``<component>.``, are JSON in the header; without them alpha is
r, module by module.

A file of one component alone (`save_lora_adapter`) has keys and fields without ``<component>.``:
`component` is then "".

Source: the files of diffusers 0.42.
Deviates: keys of older versions (``to_q_lora.down``, ``lora_linear_layer``) are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.io import safetensors_file
from jlora.io.errors import FormatError
from jlora.io.names import NameMap
from jlora.io.peft import config as peft_config
from jlora.io.peft.lora import DORA, LORA, MAGNITUDE, MATRIX
from jlora.io.peft.read import ROOT, by_module, check_modules, check_rest, join, sites_of
from jlora.io.peft.table import Arrays, Read
from jlora.io.peft.write import torch_side

METADATA = "lora_adapter_metadata"


def load_diffusers(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Any,
    component: str = "transformer",
    *,
    others: str = "refuse",
) -> Adapter:
    """Reads the LoRA (or DoRA) of one component, ``unet``, ``transformer``, ``text_encoder``, ...

    Args:
      path: the ``.safetensors`` file.
      names: from site paths to torch modules.
      params_or_sites: as for `load_peft`.
      component: the first part of the keys, "" where they have none.
      others: what to do with keys of other components: "refuse" the file or "leave" them.

    Raises:
      FormatError: anything damaged, missing, surplus or not understood.
      ValueError: `names` does not fit the sites.
    """
    source = Path(path)
    tensors, header = safetensors_file.read(source)
    start = _start(component)
    mine = _under(tensors, start)
    if len(mine) != len(tensors) and others != "leave":
        strange = sorted(key for key in tensors if not key.startswith(start))[:3]
        raise FormatError(source, f"has keys of other components: {strange}")
    told = safetensors_file.parse_json(source, header.get(METADATA, "{}").encode())
    if not isinstance(told, dict):
        raise FormatError(source, f"{METADATA} is no JSON object")
    table = DORA if any(key.endswith(f".{MAGNITUDE}") for key in mine) else LORA
    found, _, rest = by_module({ROOT + k: v for k, v in mine.items()}, table)
    config = {"peft_type": "LORA", **_under(told, start)}
    if "r" not in config:
        config |= _plain_ranks(source, found)
    if not config.get("target_modules"):
        config["target_modules"] = sorted(found)
    reader = peft_config.Reader(source, config, table)
    check_rest(source, reader, rest, "refuse")
    sites, _ = sites_of(params_or_sites, names)
    modules = names.table(sites.values())
    check_modules(source, reader, found, {}, modules, table)
    slices: dict[str, dict[tuple[int, ...], Read]] = {}
    for module, parts in found.items():
        where, index = modules[module]
        try:
            read = table.read(sites[where].slice(), parts, reader.fields(module))
        except ValueError as error:
            raise FormatError(source, f"{module}: {error}") from error
        slices.setdefault(where, {})[index] = read
    return join(source, table, sites, slices, {})


def save_diffusers(
    path: str | os.PathLike[str], adapter: Adapter, names: NameMap, component: str = "transformer"
) -> None:
    """Writes a LoRA or DoRA adapter as one file that diffusers' `load_lora_weights` takes.

    With `component` "" it is one for `load_lora_adapter` of the component, with ``prefix=None``.

    Raises:
      FormatError: another method, or nothing to write.
      ValueError: a site has no name, or two have the same.
    """
    one_adapter(adapter, "save_diffusers")
    source = Path(path)
    tensors, fields, table = torch_side(source, adapter, names, None)
    if table not in (LORA, DORA):
        raise FormatError(source, f"diffusers loads LoRA only, got {table.method.__name__}")
    config = peft_config.combine(source, table, fields, {})
    start = _start(component)
    told = {f"{start}{key}": value for key, value in sorted(config.items())}
    keys = {f"{start}{k.removeprefix(ROOT)}": v for k, v in tensors.items()}
    header = {"format": "pt", METADATA: json.dumps(told, indent=2, sort_keys=True)}
    safetensors_file.write(source, keys, header)


def _start(component: str) -> str:
    return f"{component}." if component else ""


def _under(tree: Mapping[str, Any], start: str) -> dict[str, Any]:
    return {k.removeprefix(start): v for k, v in tree.items() if k.startswith(start)}


def _plain_ranks(source: Path, found: Mapping[str, Arrays]) -> dict[str, Any]:
    """Without metadata every module has the rank of its tensors, and alpha is the rank."""
    ranks = {}
    for module, t in found.items():
        if MATRIX[0] not in t or t[MATRIX[0]].ndim < 2:
            raise FormatError(source, f"{module}: no matrix {MATRIX[0]}")
        ranks[module] = int(t[MATRIX[0]].shape[0])
    patterns = {module.replace(".", r"\."): rank for module, rank in ranks.items()}
    return {"r": 1, "lora_alpha": 1, "rank_pattern": patterns, "alpha_pattern": patterns}
