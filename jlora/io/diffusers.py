"""LoRA adapters in the one-file format of diffusers (`pytorch_lora_weights.safetensors`).

Keys are ``<component>.<module>.lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r], with DoRA
``lora_magnitude_vector`` [out] as well; of convolutions as PEFT has them (`torch_layout`). The
fields of PEFT's config, each under ``<component>.``, are JSON in the header; without them alpha is
the number ``<component>.<module>.alpha``, or else r, module by module.

Files of ComfyUI and of older programs call the two factors ``lora_down.weight`` and
``lora_up.weight``, or ``lora.down.weight`` and ``lora.up.weight``; such modules are read as those
of `kohya_modules`, of any of its methods.

A file of one component alone (`save_lora_adapter`) has keys and fields without ``<component>.``:
`component` is then "".

Source: the files of diffusers 0.42, and which alpha its `get_peft_kwargs` takes.
Deviates: keys of older versions (``to_q_lora.down``, ``lora_linear_layer``) are refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.site import Site
from jlora.io import fused, safetensors_file
from jlora.io.errors import FormatError, keys_seen, near
from jlora.io.json_file import parse_json
from jlora.io.kohya import modules as kohya_modules
from jlora.io.kohya.modules import ALPHA, DOWN, UP
from jlora.io.model_sites import ModelSites, model_sites
from jlora.io.names import NameMap
from jlora.io.peft import config as peft_config
from jlora.io.peft.lora import DORA, LORA, MAGNITUDE, MATRIX, TABLE
from jlora.io.peft.read import ROOT, stacked
from jlora.io.peft.table import Arrays, Read, scale_of
from jlora.io.peft.write import torch_side
from jlora.io.slices import sliced
from jlora.types import Json, Tree

METADATA = "lora_adapter_metadata"
OURS = (*MATRIX, *TABLE, MAGNITUDE, ALPHA)
OTHERS = {**{suffix: suffix for suffix in kohya_modules.SUFFIXES}, "lora.down.weight": DOWN}
OTHERS["lora.up.weight"] = UP


def load_diffusers(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Tree,
    component: str = "transformer",
    *,
    layout: str | None = None,
    others: str = "refuse",
) -> Adapter:
    """Reads the LoRA (or DoRA) of one component, ``unet``, ``transformer``, ``text_encoder``, ...

    Args:
      path: the ``.safetensors`` file.
      names: from site paths to torch modules.
      params_or_sites: as for `load_peft`.
      component: the first part of the keys (``diffusion_model`` in ComfyUI's files), "" where they
        have none; "transformer", as in most present models.
      layout: as for `load_peft`.
      others: what to do with keys of other components: "refuse" the file, so that none is lost
        unnoticed, or "leave" them.

    Returns:
      The adapter, arrays in the dtype of the file.

    Raises:
      FormatError: anything damaged, missing, unexpected or not understood; a file without a key of
        the component.
      ValueError: `names` does not fit the sites, or a square matrix among parameters without a
        `layout`.
    """
    source = Path(path)
    tensors, header = safetensors_file.read(source)
    start = _start(component)
    own = _under(tensors, start)
    if len(own) != len(tensors) and others != "leave":
        strange = sorted(key for key in tensors if not key.startswith(start))[:3]
        raise FormatError(
            source, f"has keys of other components: {strange}, expected {start!r} first"
        )
    if not own:
        wanted = f"no key starts with {start!r}" if start else "no tensor of an adapter"
        raise FormatError(source, f"{wanted}; {keys_seen(tensors)}")
    declared = _metadata(source, header, start)
    model = model_sites(params_or_sites, names, layout)
    modules = names.table(model.sites.values())
    by_module = _by_module(source, own, start)
    table = DORA if any(MAGNITUDE in parts for parts in by_module.values()) else LORA
    reader = peft_config.Reader(source, {"peft_type": "LORA", **declared}, table)
    try:
        by_module = fused.spread(by_module, modules)
        outputs = {name: model.sites[where].d_out for name, (where, _) in modules.items()}
        required = reader.targets if declared.get("target_modules") else lambda module: False
        by_module, alphas = fused.joined(
            by_module, outputs, partial(_scale, reader, declared), required
        )
    except ValueError as error:
        raise (
            error if isinstance(error, FormatError) else FormatError(source, str(error))
        ) from error
    lost = sorted(by_module.keys() - modules.keys())
    if lost:
        raise FormatError(
            source,
            f"module {start + lost[0]!r} is not a site of this model and name map; nearest: "
            f"{near(lost[0], modules) or 'none'}",
        )
    model = model.with_tables(
        {modules[m][0] for m, t in by_module.items() if t.keys() & set(TABLE)}
    )
    read = _reader(source, by_module, declared, modules, alphas)
    slices: dict[str, dict[tuple[int, ...], Read]] = {}
    for module, parts in by_module.items():
        where, index = modules[module]
        site = model.site(where)
        try:
            slices.setdefault(where, {})[index] = read(module, site.slice(), parts)
        except ValueError as error:
            raise FormatError(source, f"{start}{module}: {error}") from error
    return _joined(source, model, slices)


def save_diffusers(
    path: str | os.PathLike[str], adapter: Adapter, names: NameMap, component: str = "transformer"
) -> None:
    """Writes a LoRA or DoRA adapter as one file that diffusers' `load_lora_weights` takes.

    Args:
      path: the ``.safetensors`` file.
      adapter: one adapter, of LoRA or DoRA sites.
      names: from site paths to torch modules.
      component: the first part of the keys; with "" the file is one for `load_lora_adapter` of the
        component, with ``prefix=None``.

    Raises:
      FormatError: another method, or nothing to write.
      ValueError: a site has no name, two have the same, or the adapter is a bank.
    """
    one_adapter(adapter, "save_diffusers")
    adapter = sliced(adapter, names)
    source = Path(path)
    tensors, fields, table = torch_side(source, adapter, names, None)
    if table not in (LORA, DORA):
        raise FormatError(source, f"diffusers loads LoRA only, got {table.method.__name__}")
    config = peft_config.combine(source, table, fields, {})
    start = _start(component)
    declared = {f"{start}{key}": value for key, value in sorted(config.items())}
    keys = {f"{start}{k.removeprefix(ROOT)}": v for k, v in tensors.items()}
    header = {"format": "pt", METADATA: json.dumps(declared, indent=2, sort_keys=True)}
    safetensors_file.write(source, keys, header)


def _start(component: str) -> str:
    return f"{component}." if component else ""


def _under(tree: Mapping[str, Json], start: str) -> dict[str, Json]:
    return {k.removeprefix(start): v for k, v in tree.items() if k.startswith(start)}


def _metadata(source: Path, header: Mapping[str, str], start: str) -> dict[str, Json]:
    """The component's fields of PEFT's config, none in most files."""
    declared = parse_json(source, header.get(METADATA, "{}").encode())
    if not isinstance(declared, dict):
        raise FormatError(source, f"{METADATA} is not a JSON object")
    return _under(declared, start)


def _by_module(source: Path, own: Mapping[str, np.ndarray], start: str) -> dict[str, Arrays]:
    """Module -> suffix -> tensor, the suffixes as LoRA's table or as `kohya_modules` has them."""
    by_module: dict[str, Arrays] = {}
    suffixes = {**{suffix: suffix for suffix in OURS}, **OTHERS}
    for key, tensor in own.items():
        end = next((s for s in suffixes if key.endswith(f".{s}")), None)
        if end is None:
            raise FormatError(
                source,
                f"surplus tensor {start + key!r}, expected keys that end in {list(OURS[:2])}",
            )
        module = key[: -len(end) - 1]
        if suffixes[end] in by_module.setdefault(module, {}):
            raise FormatError(source, f"{start}{module} has {suffixes[end]!r} by two names")
        by_module[module][suffixes[end]] = tensor
    return by_module


def _scale(
    reader: peft_config.Reader, declared: Mapping[str, Json], module: str, t: Arrays, rank: int
) -> float:
    """The scale of one module of a fused site."""
    if not t.keys() <= set(OURS):
        return (kohya_modules.alpha_of(t) or rank) / rank
    fields = reader.fields(module) | ({} if "r" in declared else _plain(t))
    if fields["r"] != rank:
        raise ValueError(f"{module}: {MATRIX[0]} has {rank} rows, expected {fields['r']}")
    return float(scale_of(fields["lora_alpha"], rank, fields["use_rslora"]))


def _reader(
    source: Path,
    by_module: Mapping[str, Arrays],
    declared: dict[str, Json],
    modules: Mapping[str, Json],
    alphas: Mapping[str, float],
) -> Callable[[str, Site, Arrays], Read]:
    """What reads one module: by the metadata, or by the module's own tensors alone."""
    table = DORA if any(MAGNITUDE in parts for parts in by_module.values()) else LORA
    foreign = sorted(m for m, parts in by_module.items() if not parts.keys() <= set(OURS) - {ALPHA})
    if declared and foreign:
        raise FormatError(
            source,
            f"has {METADATA} and, at {foreign[0]!r}, {sorted(by_module[foreign[0]])}: two sources "
            f"of the scale, expected {list(MATRIX)} there",
        )
    config = {"peft_type": "LORA", **declared}
    if declared and not config.get("target_modules"):
        config["target_modules"] = sorted(by_module)
    reader = peft_config.Reader(source, config, table)
    if declared:
        _check_targets(source, reader, by_module, modules)

    def read(module: str, site: Site, parts: Arrays) -> Read:
        if not parts.keys() <= set(OURS):
            more = {ALPHA: np.asarray(alphas[module])} if module in alphas else {}
            return kohya_modules.read(site, {**parts, **more})
        if not any(parts.keys() - {ALPHA} == set(keys) for keys in table.layouts):
            absent = [key for key in MATRIX if key not in parts]
            why = f"no matrix {absent[0]}; " if absent and not parts.keys() & set(TABLE) else ""
            wanted = [list(keys) for keys in table.layouts]
            raise ValueError(f"{why}got {sorted(parts)}, expected one of {wanted}")
        fields = reader.fields(module)
        if module in alphas:
            rank = len(parts[MATRIX[0]])
            fields |= {"r": rank, "lora_alpha": alphas[module], "use_rslora": False}
        elif "r" not in declared:
            fields |= _plain(parts)
        return table.read(site, {k: t for k, t in parts.items() if k != ALPHA}, fields)

    return read


def _check_targets(
    source: Path,
    reader: peft_config.Reader,
    by_module: Mapping[str, Arrays],
    modules: Mapping[str, Json],
) -> None:
    """The metadata targets the modules with tensors, and no others of the model."""
    strange = next((module for module in by_module if not reader.targets(module)), None)
    if strange is not None:
        raise FormatError(source, f"has tensors of {strange!r}, which {METADATA} does not target")
    lacking = peft_config.absent(reader, modules, by_module)
    if lacking:
        raise FormatError(source, f"lacks tensors of the targets {lacking[:4]} of {METADATA}")


def _plain(parts: Arrays) -> dict[str, Json]:
    """Without metadata a module has the rank of its tensors, and its alpha, or else the rank."""
    first = parts[TABLE[0] if TABLE[0] in parts else MATRIX[0]]
    rank = int(first.shape[0]) if first.ndim >= 2 else 0
    alpha = parts.get(ALPHA)
    if alpha is not None and alpha.size != 1:
        raise ValueError(f"alpha has shape {list(alpha.shape)}, expected one number")
    number = rank if alpha is None else float(alpha.astype(np.float64).reshape(()))
    return {"r": rank, "lora_alpha": int(number) if float(number).is_integer() else number}


def _joined(
    source: Path, model: ModelSites, slices: Mapping[str, Mapping[tuple[int, ...], Read]]
) -> Adapter:
    trainable, frozen, done = {}, {}, []
    for where in sorted(slices):
        sparse = all(kohya_modules.sparse(read.method) for read in slices[where].values())
        site = dataclasses.replace(model.sites[where], group="")
        method, trainable[where], frozen[where] = stacked(source, site, slices[where], sparse)
        done.append((site, method))
    return Adapter(trainable, frozen, tuple(done))
