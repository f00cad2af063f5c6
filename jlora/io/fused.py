"""Modules that are one in the file and several sites of the model: fused query, key and value.

A name map says which outputs of the file's module a site is, ``blocks.{i}.attn.qkv[0:8]`` for the
first eight. The adapter of the outputs start ... stop of a fused module is exact for methods whose
outputs do not mix:

.. math:: (W + s A B)_{:, start:stop} = W_{:, start:stop} + s A\\, B_{:, start:stop}

LoRA's and HiRA's first factor is that of each site, as are alpha and rank; the second one, DoRA's
magnitudes per output and LoHa's two output factors are cut. Each site is then an adapter of its
own, so that these maps are for reading only.

The other way round ``blocks.{i}.to_q + blocks.{i}.to_k`` is a fused site whose outputs are those of
several modules. With the ranks side by side, A = [A_q A_k] and B block-diagonal, their LoRA is one
of the site, of the sum of the ranks; scales that differ go into the blocks of B (in its dtype).
DoRA's magnitudes per output follow each other. One module may be missing: its block is zero.

Original to jlora; the sizes are the model's.
Deviates: LoKr, OFT and the like, cores, and magnitudes per input are refused: their outputs mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jlora.io.peft.table import Arrays

PART = re.compile(r"(.*)\[(\d+):(\d+)\]")
SUM = " + "
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
MAGNITUDES = ("lora_magnitude_vector", "dora_scale")
# Suffix -> the axis of the outputs; None where all outputs have the same.
AXES: dict[str, int | None] = {
    "lora_A.weight": None,
    "lora_B.weight": 0,
    "lora_down.weight": None,
    "lora_up.weight": 0,
    "lora_magnitude_vector": 0,
    "dora_scale": 0,
    "hada_w1_a": 0,
    "hada_w1_b": None,
    "hada_w2_a": 0,
    "hada_w2_b": None,
    "hira_A": None,
    "hira_B": 0,
    "alpha": None,
}


def whole(module: str) -> str:
    """The file's module of a name, without its part.

    Args:
      module: such as ``blocks.0.attn.qkv[0:8]``, or a name without a part.

    Returns:
      ``blocks.0.attn.qkv``.
    """
    match = PART.fullmatch(module)
    return match[1] if match else module


def check_whole(path: str, module: str) -> None:
    """Refuses to write a site that is a part of a module: its file would need the other parts.

    Args:
      path: of the site.
      module: its name by the name map.

    Raises:
      ValueError: a part, or a sum of modules.
    """
    if PART.fullmatch(module) or SUM in module:
        raise ValueError(
            f"{path}: got the part or sum {module!r}, expected a module of its own; "
            "maps of fused modules are for reading, write with the model's own names"
        )


def spread(by_module: Mapping[str, Arrays], known: Iterable[str]) -> dict[str, Arrays]:
    """Fused modules of a file as their parts.

    Args:
      by_module: module -> suffix -> tensor.
      known: the names of the model's slices; those with ``[start:stop]`` are parts.

    Returns:
      The same, with each part in the place of the fused module.

    Raises:
      ValueError: parts that leave outputs out or have them twice, or a method whose outputs mix.
    """
    parts: dict[str, list[tuple[int, int, str]]] = {}
    for name in known:
        match = PART.fullmatch(name)
        if match and match[1] in by_module:
            parts.setdefault(match[1], []).append((int(match[2]), int(match[3]), name))
    per_module = {module: dict(t) for module, t in by_module.items() if module not in parts}
    for module, rows in parts.items():
        tensors, at = by_module[module], 0
        for start, stop, _ in sorted(rows):
            if start != at or stop <= start:
                raise ValueError(
                    f"{module}: got parts {[f'{a}:{b}' for a, b, _ in sorted(rows)]}, expected "
                    "each output in one of them"
                )
            at = stop
        for start, stop, name in rows:
            per_module[name] = {
                key: _cut(module, key, t, start, stop, at) for key, t in tensors.items()
            }
    return per_module


def _cut(module: str, key: str, t: np.ndarray, start: int, stop: int, size: int) -> np.ndarray:
    if key not in AXES:
        raise ValueError(f"{module}: {key} mixes the outputs of a fused module; expected LoRA")
    axis = AXES[key]
    if axis is None:
        return t
    if not t.ndim or t.shape[axis] != size:
        raise ValueError(
            f"{module}: {key} has shape {list(t.shape)}, the name map's parts have {size} outputs"
        )
    return t[start:stop]


def joined(
    by_module: Mapping[str, Arrays],
    outputs: Mapping[str, int],
    scale: Callable[[str, Arrays, int], float],
    required: Callable[[str], bool],
) -> tuple[dict[str, Arrays], dict[str, float]]:
    """Modules of a file that are one fused site of the model, as one.

    Args:
      by_module: module -> suffix -> tensor.
      outputs: the names of the model's slices -> d_out; those with " + " are fused.
      scale: (module, its tensors, its rank) -> what its product is multiplied with.
      required: whether a module must be in the file.

    Returns:
      (module -> suffix -> tensor, the alpha of each fused site by name).

    Raises:
      ValueError: modules that are not LoRA or DoRA, of other shapes, or more than one missing.
    """
    per_module, alphas = dict(by_module), {}
    for name, size in outputs.items():
        modules = name.split(SUM)
        here = [module for module in modules if module in by_module]
        if len(modules) == 1 or not here:
            continue
        lost = [module for module in modules if module not in by_module]
        if len(lost) > 1 or any(map(required, lost)):
            raise ValueError(f"{name}: lacks tensors of {lost}, expected at most one module less")
        parts = {module: per_module.pop(module) for module in here}
        per_module[name], alphas[name] = _join(name, modules, parts, size, scale)
    return per_module, alphas


def _join(
    name: str,
    modules: list[str],
    parts: Mapping[str, Arrays],
    size: int,
    scale: Callable[[str, Arrays, int], float],
) -> tuple[Arrays, float]:
    tensors = next(iter(parts.values()))
    pair = next((p for p in PAIRS if set(p) <= set(tensors)), PAIRS[0])
    extra = next((m for m in MAGNITUDES if m in tensors), None)
    expected = {*pair} if extra is None else {*pair, extra}
    for module, t in parts.items():
        if set(t) - {"alpha"} != expected:
            raise ValueError(f"{module}: got {sorted(t)}, expected {sorted(expected)} to be joined")
        a, b = (t[key] for key in pair)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ValueError(f"{module}: got {a.shape} and {b.shape}, expected [r, in], [out, r]")
        if extra and (t[extra].size != len(b) or t[extra].shape[0] != len(b)):
            raise ValueError(f"{module}: {extra} has {t[extra].shape}, expected {len(b)} outputs")
    rows = {module: len(t[pair[1]]) for module, t in parts.items()}
    left = size - sum(rows.values())
    if (left > 0) != (len(parts) < len(modules)) or left < 0:
        raise ValueError(f"{name}: got modules of {rows} outputs, expected {size} together")
    if left and extra:
        raise ValueError(f"{name}: lacks the magnitudes of {left} outputs")
    ranks = {module: len(t[pair[0]]) for module, t in parts.items()}
    scales = {module: scale(module, t, ranks[module]) for module, t in parts.items()}
    common = scales[next(iter(parts))]
    if len(set(scales.values())) > 1:
        common = 1.0
    kind = tensors[pair[1]].dtype
    second = np.zeros((size, sum(ranks.values())), kind)
    row = column = 0
    for module in modules:
        if module not in parts:
            row += left
            continue
        b = parts[module][pair[1]]
        block = b if scales[module] == common else (b * np.float32(scales[module])).astype(kind)
        second[row : row + len(b), column : column + b.shape[1]] = block
        row, column = row + len(b), column + b.shape[1]
    joint = {
        pair[0]: np.concatenate([parts[m][pair[0]] for m in modules if m in parts]),
        pair[1]: second,
    }
    if extra:
        joint[extra] = np.concatenate([parts[m][extra] for m in modules])
    return joint, common * sum(ranks.values())
