"""Quantised weights of a base model: how they lie in files, and their values where that is known.

==================  ===============================================================  ===========
layout              tensors of a module                                              here
==================  ===============================================================  ===========
LLM.int8            `weight` int8 [out, in], `SCB` float32 [out], `weight_format`    read
bitsandbytes 4-bit  `weight` uint8 [n, 1], `weight.absmax`, `weight.quant_map`, ...  refused
GPTQ, AWQ           `qweight` int32, `qzeros`, `scales` (GPTQ: `g_idx`)              refused
scaled fp8, int8    `weight` float8 or int8, `weight_scale` or `weight_scale_inv`    refused
others              `weight_packed`, `weight._data`, `W_q`, `codebooks`, ...         refused
==================  ===============================================================  ===========

.. math:: w_{ij} = c_{ij} \\, s_i / 127 \\qquad \\text{(LLM.int8; codes } c \\text{, scales } s)

A module that an adapter changes is written in floating point, without its codes and scales; all
other modules stay as they are, bit by bit.

Reference: Dettmers 2022, 2208.07339 (LLM.int8).
Source: files of bitsandbytes 0.50, and the names that other packages give their tensors.
Deviates: PEFT rounds merged weights to eight bits again, which loses most of a small delta.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

INT8 = "LLM.int8"
TOP = 127.0  # the code of the largest value of a row
ROW_MAJOR = 0  # the only `weight_format` that bitsandbytes still loads

# suffix of a tensor -> the layout that it is a part of; the first that a module has tells
MARKS = {
    "SCB": INT8,
    "weight.absmax": "bitsandbytes 4-bit",
    "g_idx": "GPTQ",
    "qweight": "AWQ or GPTQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "scaled fp8",
    "weight_scale": "weights with a scale (fp8 or int8)",
    "weight_scales": "EETQ int8",
    "weight._data": "quanto",
    "W_q": "HQQ",
    "codebooks": "AQLM",
}
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # tensor -> shape, dtype


class Module(NamedTuple):
    """A quantised module."""

    layout: str  # a value of `MARKS`
    parts: frozenset[str]  # the names of its tensors but the bias


def modules(shapes: Shapes) -> dict[str, Module]:
    """The quantised modules of a base.

    Args:
      shapes: of all its tensors.

    Returns:
      Module -> its layout and tensors.
    """
    kinds: dict[str, str] = {}
    for suffix, layout in MARKS.items():
        for name in shapes:
            if name.endswith(f".{suffix}"):
                kinds.setdefault(name.removesuffix(f".{suffix}"), layout)
    parts: dict[str, set[str]] = {module: set() for module in kinds}
    for name in shapes:
        module = name.rpartition(".")[0]
        while module and module not in parts:  # `weight.quant_state.bitsandbytes__nf4`
            module = module.rpartition(".")[0]
        if module and name != f"{module}.bias":
            parts[module].add(name)
    return {module: Module(layout, frozenset(parts[module])) for module, layout in kinds.items()}


def refusal(name: str, shapes: Shapes, quantised: Mapping[str, Module]) -> str | None:
    """Why a weight cannot be read as numbers.

    Args:
      name: such as ``model.layers.0.mlp.up_proj.weight``; it need not exist.
      shapes: of all tensors of the base.
      quantised: `modules` of them.

    Returns:
      Got and expected; None where it can be read.
    """
    module = name.removesuffix(".weight")
    dtype = shapes[name][1] if name in shapes else None
    kind = f"{dtype} weights" if dtype is not None else "no plain weight"
    if module in quantised and quantised[module].layout != INT8:
        layout = quantised[module].layout
        return (
            f"{name}: got {kind} quantised as {layout}, expected floating point or LLM.int8; give "
            "the model before quantisation as base_model (adapters alone merge without one)"
        )
    if module in quantised:
        expected = (shapes[name][0][:1], np.dtype(np.float32)) if name in shapes else None
        got = shapes.get(f"{module}.SCB")
        if dtype != np.int8 or got != expected:
            return f"{name}: got {kind} and SCB {got}, expected int8 and {expected} (LLM.int8)"
        return None
    if dtype is not None and dtype.kind not in "fV":  # V: bfloat16, float8
        return (
            f"{name}: got {kind} without a scale that is known (LLM.int8 has SCB), expected "
            "floating point"
        )
    return None


def dequantised(
    codes: Int[np.ndarray, "d_out d_in"], scales: Float[np.ndarray, "d_out"]
) -> Float32[np.ndarray, "d_out d_in"]:
    """The values of LLM.int8 codes.

    Args:
      codes: -127 ... 127.
      scales: the largest magnitude of each row.

    Returns:
      [d_out, d_in], float32.
    """
    return codes.astype(np.float32) * scales.astype(np.float32)[:, None] / np.float32(TOP)
