"""Adapters in the one-file format of kohya's sd-scripts and of LyCORIS.

Keys are ``<prefix>_<module, '.' as '_'>.<suffix>``; `kohya_modules` says which suffixes there are.
Underscores hide where modules end, so names are looked up among those of the model at hand, never
parsed. Each module may have its own method and rank.

Source: the files of sd-scripts and LyCORIS 4.1.
Deviates: what `kohya_modules` refuses.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.io import fused, safetensors_file
from jlora.io.errors import FormatError, keys_seen, near
from jlora.io.kohya import modules as kohya_modules
from jlora.io.model_sites import model_sites
from jlora.io.names import NameMap
from jlora.io.peft.read import stacked
from jlora.io.peft.table import Arrays, Read
from jlora.io.slices import sliced
from jlora.types import Tree


def load_kohya(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Tree,
    prefix: str = "lora_unet",
    *,
    layout: str | None = None,
    others: str = "refuse",
) -> Adapter:
    """Reads the modules of one prefix from a kohya or LyCORIS file.

    Args:
      path: the ``.safetensors`` file.
      names: from site paths to torch modules.
      params_or_sites: as for `load_peft`.
      prefix: ``lora_unet``, ``lora_te``, ``lora_te1``, ``lora_te2``, ``lycoris``, ...
      layout: as for `load_peft`.
      others: what to do with keys of other prefixes (the text encoder alongside the U-Net):
        "refuse"
        the file, so that none is lost unnoticed, or "leave" them.

    Returns:
      The adapter, arrays in the dtype of the file.

    Raises:
      FormatError: anything damaged, missing, unexpected or not understood.
      ValueError: `names` does not fit the sites.
    """
    source = Path(path)
    tensors, _ = safetensors_file.read(source)
    model = model_sites(params_or_sites, names, layout)
    modules: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, where in names.table(model.sites.values()).items():
        key = _flat(prefix, module)
        if key in modules:
            raise FormatError(source, f"two modules are called {key!r} in this format")
        modules[key] = where
    slices: dict[str, dict[tuple[int, ...], Read]] = {}
    groups = _grouped(source, tensors, prefix, others)
    try:
        groups = fused.spread(groups, modules)
        outputs = {key: model.sites[where].d_out for key, (where, _) in modules.items()}
        groups, alphas = fused.joined(groups, outputs, _scale, lambda module: False)
        for key, alpha in alphas.items():
            groups[key]["alpha"] = np.asarray(alpha)
    except ValueError as error:
        raise FormatError(source, str(error)) from error
    for key, arrays in groups.items():
        if key not in modules:
            close = near(key, modules) or "none"
            raise FormatError(
                source, f"module {key!r} is not a site of this model; nearest: {close}"
            )
        where, index = modules[key]
        site = model.site(where)
        try:
            slices.setdefault(where, {})[index] = kohya_modules.read(site.slice(), arrays)
        except ValueError as error:
            raise FormatError(source, f"{key}: {error}") from error
    if not slices:
        raise FormatError(source, f"no key starts with {prefix + '_'!r}; {keys_seen(tensors)}")
    trainable, frozen, done = {}, {}, []
    for where in sorted(slices):
        sparse = all(kohya_modules.sparse(read.method) for read in slices[where].values())
        site = model.sites[where]
        method, trainable[where], frozen[where] = stacked(source, site, slices[where], sparse)
        done.append((dataclasses.replace(site, group=""), method))
    return Adapter(trainable, frozen, tuple(done))


def save_kohya(
    path: str | os.PathLike[str], adapter: Adapter, names: NameMap, prefix: str = "lora_unet"
) -> None:
    """Writes LoRA, LoCon, DoRA, LoHa and LoKr sites, decomposed or not, as one file.

    Args:
      path: the ``.safetensors`` file.
      adapter: one adapter; its sites may have different methods.
      names: from site paths to torch modules.
      prefix: put before every module name, with an underscore.

    Raises:
      FormatError: another method, or nothing to write.
      ValueError: a site has no name, two have the same, or the adapter is a bank.
    """
    one_adapter(adapter, "save_kohya")
    adapter = sliced(adapter, names)
    source = Path(path)
    tensors: Arrays = {}
    for site, method in adapter.sites:
        own = {k: np.asarray(v) for k, v in adapter.arrays(site)[0].items()}
        for index in np.ndindex(*site.stack):
            module = names.module(site.path, index)
            fused.check_whole(site.path, module)
            key = _flat(prefix, module)
            try:
                part = {name: array[index] for name, array in own.items()}
                written = kohya_modules.write(site.slice(), method, part)
            except ValueError as error:
                raise FormatError(source, f"{site.path}{list(index)}: {error}") from error
            if any(f"{key}.{suffix}" in tensors for suffix in written):
                raise ValueError(f"two modules are called {key!r} in this format")
            tensors.update({f"{key}.{suffix}": array for suffix, array in written.items()})
    if not tensors:
        raise FormatError(source, "all slices of the adapter are zero: nothing to write")
    safetensors_file.write(source, tensors, {"format": "pt"})


# --- keys ---------------------------------------------------------------------------------------


def _flat(prefix: str, module: str) -> str:
    parts = module.split(fused.SUM)
    return fused.SUM.join(f"{prefix}_{part.replace('.', '_')}" for part in parts)


def _scale(module: str, tensors: Arrays, rank: int) -> float:
    return (kohya_modules.alpha_of(tensors) or rank) / rank


def _grouped(source: Path, tensors: Arrays, prefix: str, others: str) -> dict[str, Arrays]:
    """Flat module name -> suffix -> tensor, of one prefix."""
    groups: dict[str, Arrays] = {}
    for key, tensor in tensors.items():
        module, _, suffix = key.partition(".")
        if module.startswith(f"{prefix}_"):
            groups.setdefault(module, {})[suffix] = tensor
        elif others != "leave":
            dotted = "." in suffix.removesuffix(".weight")
            advice = "; dotted names are diffusers' or ComfyUI's, see load_diffusers"
            raise FormatError(
                source,
                f"key {key!r} does not start with {prefix + '_'!r}{advice if dotted else ''}",
            )
    return groups
