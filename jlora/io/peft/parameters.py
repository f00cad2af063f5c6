"""LoRA with `target_parameters`: weights that are bare parameters of a module, as experts are.

A name map says which with brackets, ``layers.{i}.mlp.experts[gate_up_proj]``; the stack axis of the
site that the template does not name, if there is one, are the experts. Parameters of one module
stand in the map in the order in which the module defines them: PEFT wraps the first innermost, so
that only the depth of ``base_layer`` in a key tells whose it is.

=========  ==============  =============================================================
array      ours, expert e  PEFT's tensor
=========  ==============  =============================================================
a          [d_in, r]       ``lora_A.weight`` [E r, d_in], rows e r ... e r + r - 1
b          [r, d_out]      ``lora_B.weight`` [d_out, r E], columns e, e + E, ...
=========  ==============  =============================================================

Where PEFT takes the parameter's axes for the other way round (a module that keeps [E, in, out] and
does not say ``is_transposed``, as Llama 4's), A is on the outputs: ``experts[gate_up_proj.T]``.

Source: peft 0.21.2, read for its behaviour (`ParamWrapper`, `_inject_parameters`).
Deviates: the config is written with whole names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.io.errors import FormatError
from jlora.io.names import NameMap, Parameter
from jlora.io.peft import config as peft_config
from jlora.io.peft.read import ROOT
from jlora.io.peft.table import Arrays, Fields, Read, Table, alpha_of, scale_of, trim, want_shape
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic, Json

FIELD, KEYS, INNER = "target_parameters", ("lora_A.weight", "lora_B.weight"), ".base_layer"
Slices = dict[str, dict[tuple[int, ...], Read]]


def taken(
    path: Path,
    config: Mapping[str, Json],
    table: Table,
    tensors: Arrays,
    parameters: Iterable[Parameter],
) -> tuple[Arrays, Slices]:
    """The slices of parameters in a file.

    Args:
      path: of the file, for errors.
      config: its fields.
      table: of LoRA.
      tensors: of the file, by key.
      parameters: of the model, see `NameMap.parameters`.

    Returns:
      (tensors without those of parameters, site path -> stack index -> what was read).

    Raises:
      FormatError: parameters that the config targets and the file lacks, or the other way round;
        fields or shapes that do not fit.
    """
    wanted = config.get(FIELD)
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise FormatError(path, f"{FIELD} = {repr(wanted)[:80]}, expected a list of names")
    if len(wanted) > peft_config.MAX_PATTERNS:
        raise FormatError(path, f"{FIELD}: want at most {peft_config.MAX_PATTERNS} names")
    reader = peft_config.Reader(path, {**config, FIELD: None}, table)
    by_module: dict[str, list[Parameter]] = {}
    for one in parameters:
        if any(one.name == name or one.name.endswith(f".{name}") for name in wanted):
            by_module.setdefault(one.module, []).append(one)
    named = [p.name for own in by_module.values() for p in own]
    lost = [w for w in wanted if not any(n == w or n.endswith(f".{w}") for n in named)]
    if lost:
        raise FormatError(path, f"{FIELD}: no site of this model and name map is called {lost[:4]}")
    rest, slices = dict(tensors), Slices()
    for module, own in by_module.items():
        for depth, one in enumerate(reversed(own)):
            keys = [f"{ROOT}{module}{INNER * depth}.{key}" for key in KEYS]
            if not all(key in rest for key in keys):
                raise FormatError(path, f"lacks {keys} of the parameter {one.name!r}")
            first, second = (rest.pop(key) for key in keys)
            try:
                reads = _read(one, first, second, reader.fields(one.name))
            except ValueError as error:
                raise FormatError(path, f"{one.name}: {error}") from error
            slices.setdefault(one.site.path, {}).update(reads)
    return rest, slices


def _read(
    one: Parameter, first: np.ndarray, second: np.ndarray, fields: Mapping[str, Json]
) -> dict[tuple[int, ...], Read]:
    if fields["lora_dropout"]:
        raise ValueError(f"lora_dropout = {fields['lora_dropout']}, PEFT has none of parameters")
    rank, alpha, rslora = fields["r"], fields["lora_alpha"], fields["use_rslora"]
    scale = scale_of(alpha, rank, rslora)
    site, n = one.site, len(one.experts)
    d_first, d_second = (site.d_out, site.d_in) if one.swapped else (site.d_in, site.d_out)
    want_shape(KEYS[0], first, (n * rank, d_first))
    want_shape(KEYS[1], second, (d_second, rank * n))
    first = first.reshape(n, rank, d_first)  # [E, r, d]
    second = second.reshape(d_second, rank, n).transpose(2, 0, 1)  # [E, d, r]
    a, b = (second, first) if one.swapped else (first.swapaxes(1, 2), second.swapaxes(1, 2))
    method = LoRA(rank=rank, alpha=alpha, rslora=rslora)
    return {
        index: Read(method, {"a": a[e], "b": b[e]}, {"scale": scale})
        for e, index in enumerate(one.experts)
    }


def split(
    path: Path, adapter: Adapter, names: NameMap
) -> tuple[Adapter, Arrays, dict[str, Fields]]:
    """Takes the parameters out of an adapter.

    Args:
      path: where they go, for errors.
      adapter: of any sites.
      names: their rules say which are parameters.

    Returns:
      (the adapter without parameters, their tensors by key, their config fields by name).

    Raises:
      FormatError: a method other than LoRA, a dropout, scales that differ between experts.
    """
    parameters = names.parameters(site for site, _ in adapter.sites)
    paths = {one.site.path for one in parameters}
    by_module: dict[str, list[tuple[Parameter, Arrays]]] = {}
    fields: dict[str, Fields] = {}
    methods = {site.path: method for site, method in adapter.sites}
    for one in parameters:
        own = {k: np.asarray(v) for k, v in adapter.arrays(one.site)[0].items()}
        try:
            written = _write(one, methods[one.site.path], own)
        except ValueError as error:
            raise FormatError(path, f"{one.site.path}: {error}") from error
        if written is not None:
            fields[one.name] = written[1]
            by_module.setdefault(one.module, []).append((one, written[0]))
    tensors: Arrays = {}
    for module, parts in by_module.items():
        for depth, (_, arrays) in enumerate(reversed(parts)):
            tensors |= {f"{ROOT}{module}{INNER * depth}.{k}": v for k, v in arrays.items()}
    kept = tuple((s, m) for s, m in adapter.sites if s.path not in paths)
    return adapter.replace(sites=kept), tensors, fields


def _write(one: Parameter, method: Dynamic, own: Arrays) -> tuple[Arrays, Fields] | None:
    if type(method) is not LoRA or method.dropout:
        raise ValueError(f"PEFT adapts parameters by LoRA without dropout, got {method}")
    for name, array in own.items():
        if array.shape[: len(one.site.stack)] != one.site.stack:
            raise ValueError(f"{name}: {array.shape}, expected {one.site.stack} first")
    p = {name: np.stack([array[index] for index in one.experts]) for name, array in own.items()}
    rank, p = trim(p, method.rank_axes)
    if rank == 0:
        return None
    if len(np.unique(p["scale"])) > 1:
        raise ValueError(f"one scale for all experts, got {np.unique(p['scale'])[:4]}")
    turned = [p[name].swapaxes(1, 2) for name in "ab"]
    first, second = (p["b"], p["a"]) if one.swapped else turned  # [E, r, d], [E, d, r]
    tensors = {
        KEYS[0]: first.reshape(-1, first.shape[2]),
        KEYS[1]: second.transpose(1, 2, 0).reshape(second.shape[1], -1),
    }
    alpha = alpha_of(method, p["scale"][0], rank, method.rslora)
    declared = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": method.rslora}
    return tensors, declared
