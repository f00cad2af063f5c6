"""Adapters in the one-file format of kohya's sd-scripts and of LyCORIS.

Keys are ``<prefix>_<module, '.' as '_'>.<suffix>``, and a scalar `alpha` a module. Underscores
hide where modules end, so names are looked up among those of the model at hand, never parsed.

====== ====================================================== =================================
method suffixes                                               delta^T
====== ====================================================== =================================
LoRA   lora_down.weight [r, in], lora_up.weight [out, r]      alpha / r  up down
DoRA   the same and dora_scale [out, 1]                       see `DoRA`
LoHa   hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b             alpha / r  (w1_a w1_b) * (w2_a w2_b)
LoKr   lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 the same way  alpha / r  w1 (x) w2
====== ====================================================== =================================

Without `alpha` it is r; a LoKr of two whole factors has no r and the scale 1. Each module may have
its own method and rank. On writing, the scale of such a LoKr goes into its second factor.

Source: the files of sd-scripts and LyCORIS 4.1.
Deviates: of convolutions, whose factors are [r, in, *window] and [out, r, 1, ...], LoRA and LoHa
only; their Tucker forms (lora_mid, hada_t1, lokr_t2), norms, biases and full weights are refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jlora.core.adapter import Adapter, Method, Site
from jlora.io import safetensors_file
from jlora.io.errors import FormatError
from jlora.io.names import NameMap, near
from jlora.io.peft_lora import DORA, LORA, MAGNITUDE, MATRIX
from jlora.io.peft_lycoris import HADA, LOHA, LOKR_LAYOUTS, PARTS, TUCKER, WHOLE, write_hada
from jlora.io.peft_read import sites_of, stacked
from jlora.io.peft_table import Arrays, Read, scale_of, trim, want_shape
from jlora.io.peft_tables import table_of
from jlora.io.torch_layout import first, is_conv, second
from jlora.methods.dora import DoRA
from jlora.methods.loha import LoHa
from jlora.methods.lokr import LoKr
from jlora.methods.lora import LoRA

DOWN, UP, DORA_SCALE, ALPHA = "lora_down.weight", "lora_up.weight", "dora_scale", "alpha"


def load_kohya(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Any,
    prefix: str = "lora_unet",
    *,
    others: str = "refuse",
) -> Adapter:
    """Reads the modules of one prefix from a kohya or LyCORIS file.

    Args:
      path: the ``.safetensors`` file.
      names: from site paths to torch modules.
      params_or_sites: as for `load_peft`.
      prefix: ``lora_unet``, ``lora_te``, ``lora_te1``, ``lora_te2``, ``lycoris``, ...
      others: what to do with keys of other prefixes (the text encoder beside the U-Net): "refuse"
        the file or "leave" them.

    Raises:
      FormatError: anything damaged, missing, surplus or not understood.
      ValueError: `names` does not fit the sites.
    """
    source = Path(path)
    tensors, _ = safetensors_file.read(source)
    sites, _ = sites_of(params_or_sites, names)
    modules: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, where in names.table(sites.values()).items():
        key = _flat(prefix, module)
        if key in modules:
            raise FormatError(source, f"two modules are called {key!r} in this format")
        modules[key] = where
    slices: dict[str, dict[tuple[int, ...], Read]] = {}
    for key, found in _grouped(source, tensors, prefix, others).items():
        if key not in modules:
            close = near(key, modules) or "none"
            raise FormatError(source, f"module {key!r} is no site of this model; nearest: {close}")
        where, index = modules[key]
        try:
            slices.setdefault(where, {})[index] = _read(sites[where].slice(), found)
        except ValueError as error:
            raise FormatError(source, f"{key}: {error}") from error
    if not slices:
        raise FormatError(source, f"no key starts with {prefix + '_'!r}")
    trainable, frozen, done = {}, {}, []
    for where in sorted(slices):
        sparse = all(table_of(read.method).sparse for read in slices[where].values())
        made = stacked(source, sites[where], slices[where], sparse)
        method, trainable[where], frozen[where] = made
        done.append((sites[where], method))
    return Adapter(trainable, frozen, tuple(done))


def save_kohya(
    path: str | os.PathLike[str], adapter: Adapter, names: NameMap, prefix: str = "lora_unet"
) -> None:
    """Writes an adapter of LoRA, DoRA, LoHa and LoKr sites as one kohya / LyCORIS file.

    Raises:
      FormatError: another method, or nothing to write.
      ValueError: a site has no name, or two have the same.
    """
    source = Path(path)
    tensors: Arrays = {}
    for site, method in adapter.sites:
        own = {k: np.asarray(v) for k, v in adapter.arrays(site)[0].items()}
        for index in np.ndindex(*site.stack):
            key = _flat(prefix, names.module(site.path, index))
            try:
                made = _write(
                    site.slice(), method, {name: array[index] for name, array in own.items()}
                )
            except ValueError as error:
                raise FormatError(source, f"{site.path}{list(index)}: {error}") from error
            if any(f"{key}.{suffix}" in tensors for suffix in made):
                raise ValueError(f"two modules are called {key!r} in this format")
            tensors.update({f"{key}.{suffix}": array for suffix, array in made.items()})
    if not tensors:
        raise FormatError(source, "all slices of the adapter are zero: nothing to write")
    safetensors_file.write(source, tensors, {"format": "pt"})


# --- one module ---------------------------------------------------------------------------------


def _read(site: Site, t: Arrays) -> Read:
    """One module's tensors; the method is told by its suffixes."""
    alpha = _alpha(t)
    keys = set(t) - {ALPHA}
    if is_conv(site) and keys not in ({DOWN, UP}, set(HADA)):
        raise ValueError(f"got {sorted(t)}, which is no LoRA or LoHa of a convolution")
    if keys in ({DOWN, UP}, {DOWN, UP, DORA_SCALE}):
        rank = t[DOWN].shape[0] if t[DOWN].ndim else 0
        fields = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
        fields |= {"use_rslora": False, "lora_dropout": 0.0}
        renamed = {MATRIX[0]: t[DOWN], MATRIX[1]: t[UP]}
        if DORA_SCALE not in t:
            return LORA.read(site, renamed, fields)
        want_shape(DORA_SCALE, t[DORA_SCALE], (site.d_out, 1))
        return DORA.read(site, {**renamed, MAGNITUDE: t[DORA_SCALE][:, 0]}, fields)
    if keys == set(HADA):
        rank = t["hada_w1_b"].shape[0] if t["hada_w1_b"].ndim else 0
        fields = {"r": rank, "alpha": rank if alpha is None else alpha, TUCKER: False}
        return LOHA.read(site, {key: t[key] for key in keys}, fields)
    if any(keys == set(layout) for layout in LOKR_LAYOUTS):
        return _read_lokr(site, {key: t[key] for key in keys}, alpha)
    raise ValueError(f"got {sorted(t)}, which is no LoRA, DoRA, LoHa or LoKr of a matrix")


def _read_lokr(site: Site, t: Arrays, alpha: float | None) -> Read:
    if any(array.ndim != 2 for array in t.values()):
        raise ValueError(f"got {_shapes(t)}, expected matrices")
    ranks = {t[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in t}
    ranks |= {t[key].shape[1] for key in ("lokr_w1_a", "lokr_w2_a") if key in t}
    if len(ranks) > 1 or 0 in ranks:
        raise ValueError(f"got {_shapes(t)}, expected one rank")
    names = {**WHOLE, **PARTS}
    trainable = {names[key]: array.T for key, array in t.items()}
    sides = [
        (t[f"lokr_w{n}_a"].shape[0], t[f"lokr_w{n}_b"].shape[1])
        if f"lokr_w{n}_a" in t
        else t[f"lokr_w{n}"].shape
        for n in (1, 2)
    ]
    shape = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])
    if shape != (site.d_out, site.d_in):
        raise ValueError(f"got {_shapes(t)}, which make {shape}, not {(site.d_out, site.d_in)}")
    rank = ranks.pop() if ranks else 1
    alpha = float(rank) if alpha is None or not ({"a1", "a2"} & set(trainable)) else alpha
    method = LoKr(rank, alpha, decompose_both="a1" in trainable)
    return Read(method, trainable, {"scale": scale_of(alpha, rank)})


def _write(site: Site, method: Method, p: Arrays) -> Arrays:
    """Suffix -> tensor of one slice; empty where it is zero padding."""
    if type(method) not in ((LoRA, LoHa) if is_conv(site) else (LoRA, DoRA, LoHa, LoKr)):
        what = " of a convolution" if is_conv(site) else ""
        raise ValueError(f"this format has no place for {type(method).__name__}{what}")
    if "gather" in site.ops:
        raise ValueError("this format has no place for tables")
    if "t1" in p:
        raise ValueError("Tucker forms are not written")
    axes = {name: axis for name, axis in method.rank_axes.items() if name in p}
    rank, p = trim(p, axes) if axes else (1, p)
    if rank == 0 or not any(array.any() for name, array in p.items() if name != "scale"):
        if isinstance(method, DoRA):
            raise ValueError("a and b are zero, which this format cannot say of DoRA")
        return {}
    alpha = {ALPHA: _exact_alpha(p["scale"], rank)}
    if isinstance(method, LoKr):
        names = {**WHOLE, **PARTS}
        if not axes and p["scale"] != 1:
            last = p["w2"] * p["scale"]  # two whole factors have the scale 1 in this format
            return {**alpha, "lokr_w1": p["w1"].T, "lokr_w2": last.T}
        return alpha | {key: p[name].T for key, name in names.items() if name in p}
    if isinstance(method, LoHa):
        return alpha | write_hada(site, p)
    made = alpha | {DOWN: first(site, p["a"]), UP: second(site, p["b"])}
    return made | ({DORA_SCALE: p["m"][:, None]} if isinstance(method, DoRA) else {})


def _exact_alpha(scale: np.ndarray, rank: int) -> np.ndarray:
    """A scalar with scale == float32(alpha / rank): float32 where it can be, else float64."""
    exact = float(scale) * rank
    for alpha in (np.float32(round(exact, 4)), np.float32(exact), np.float64(exact)):
        if scale_of(float(alpha), rank) == scale:
            return np.asarray(alpha)
    raise ValueError(f"no alpha gives the scale {float(scale)!r} at rank {rank}")


def _alpha(t: Arrays) -> float | None:
    if ALPHA not in t:
        return None
    if t[ALPHA].size != 1:
        raise ValueError(f"alpha has shape {list(t[ALPHA].shape)}, expected one number")
    return float(t[ALPHA].astype(np.float64).reshape(()))


def _shapes(t: Arrays) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in t.items()}


# --- keys ---------------------------------------------------------------------------------------


def _flat(prefix: str, module: str) -> str:
    return f"{prefix}_{module.replace('.', '_')}"


def _grouped(source: Path, tensors: Arrays, prefix: str, others: str) -> dict[str, Arrays]:
    """Flat module name -> suffix -> tensor, of one prefix."""
    found: dict[str, Arrays] = {}
    for key, tensor in tensors.items():
        module, _, suffix = key.partition(".")
        if module.startswith(f"{prefix}_"):
            found.setdefault(module, {})[suffix] = tensor
        elif others != "leave":
            raise FormatError(source, f"key {key!r} does not start with {prefix + '_'!r}")
    return found
