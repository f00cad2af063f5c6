r"""LoRA adapters as llama.cpp reads them: one GGUF file.

For a weight ``blk.3.attn_q.weight`` of d_out x d_in there are two tensors, and one alpha for all:

.. math::
    \Delta W = \frac{\alpha}{r}\, L_b L_a, \qquad L_a \in R^{r \times d_{in}}\ (\texttt{lora\_a}),
    \quad L_b \in R^{d_{out} \times r}\ (\texttt{lora\_b})

The rank of every tensor is its own. Of an embedding table llama.cpp takes rows of the first factor,
so that there ``lora_a`` is [rows, r]. Queries and keys: see `base`.

Reference: the files of llama.cpp's converter; tests compare with llama.cpp itself.
Deviates: adapters with different alpha / r per site are refused, since the file has one alpha; so
is an alpha of 0, which llama.cpp reads as r, and a table that is the output layer as well, which
ends llama.cpp's process.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.io.errors import FormatError, keys_seen, near
from jlora.io.gguf.base import TABLE, GgufBase, halves, heads_of, neighbours, tensor_names
from jlora.io.gguf.reader import field, open_gguf
from jlora.io.model_sites import model_sites
from jlora.io.names import NameMap
from jlora.io.peft import lora
from jlora.io.peft.read import ROOT, join
from jlora.io.peft.table import Arrays, Read, scale_of
from jlora.io.peft.write import torch_side
from jlora.io.slices import sliced
from jlora.types import Tree

A, B = ".weight.lora_a", ".weight.lora_b"
FLOATS = {"F32": np.float32, "F16": np.float16}  # what the files hold, without quantisation


def save_gguf(
    path: str | os.PathLike[str], adapter: Adapter, names: NameMap, base: GgufBase
) -> None:
    """Writes a LoRA adapter as one file that ``llama-server --lora`` takes.

    Args:
      path: the ``.gguf`` file.
      adapter: one adapter of LoRA sites; float32 or float16, other dtypes are refused.
      names: from site paths to the modules of transformers.
      base: of the adapter, see `gguf_base`.

    Raises:
      FormatError: another method, what the format has no words for, or a module that llama.cpp
        does not have.
      ValueError: a site has no name, two have the same, or the adapter is a bank.
    """
    one_adapter(adapter, "save_gguf")
    source = Path(path)
    tensors, fields, table = torch_side(source, sliced(adapter, names), names, None)
    if table is not lora.LORA:
        raise FormatError(
            source, f"llama.cpp runs LoRA only, got {table.method.__name__}; "
            "jlora.merging.to_lora gives the nearest LoRA of a rank"
        )  # fmt: skip
    called = tensor_names(source, base, fields)
    if lost := sorted(fields.keys() - called.keys()):
        raise FormatError(source, f"{base.architecture} of llama.cpp has no module {lost[0]!r}")
    alpha = _one_alpha(source, fields)
    written: Arrays = {}
    for module, name in called.items():
        own = {
            key: tensors[f"{ROOT}{module}.{key}"]
            for key in (*lora.MATRIX, *lora.TABLE)
            if f"{ROOT}{module}.{key}" in tensors
        }
        written |= _stored(source, base, name, own)
    _write(source, base, alpha, written)


def load_gguf(
    path: str | os.PathLike[str],
    names: NameMap,
    params_or_sites: Tree,
    base: GgufBase | None,
    *,
    layout: str | None = None,
) -> Adapter:
    """Reads a LoRA adapter of llama.cpp.

    Args:
      path: the ``.gguf`` file.
      names: from site paths to the modules of transformers.
      params_or_sites: as for `load_peft`.
      base: of the adapter, see `gguf_base`: the file does not say how many heads there are. None:
        everything is left as llama.cpp has it, `names` lead to its names (``blk.3.attn_q``), and
        the outputs of queries and keys are in its order.
      layout: as for `load_peft`.

    Returns:
      The adapter, arrays in the dtype of the file.

    Raises:
      FormatError: anything damaged, missing, unexpected or not understood; another architecture
        than the base's.
      ValueError: `names` does not fit the sites, or a square matrix among parameters without a
        `layout`.
    """
    source = Path(path)
    alpha, by_module = _read(source, base)
    model = model_sites(params_or_sites, names, layout)
    modules = names.table(model.sites.values())
    names_there = tensor_names(source, base, modules) if base else {m: m for m in modules}
    called = {name: module for module, name in names_there.items()}
    if lost := sorted(by_module.keys() - called.keys()):
        raise FormatError(
            source, f"{lost[0]!r} is not a site of this model and name map; nearest: "
            f"{near(lost[0], called) or 'none'}"
        )  # fmt: skip
    model = model.with_tables({modules[called[TABLE]][0]} if TABLE in by_module else ())
    slices: dict[str, dict[tuple[int, ...], Read]] = {}
    for name, parts in by_module.items():
        where, index = modules[called[name]]
        first, second = parts["a"], parts["b"]
        heads = heads_of(base, name) if base else None
        keys = lora.TABLE if name == TABLE else lora.MATRIX
        rank = second.shape[-1]
        try:
            if heads and second.shape[0] % (2 * heads):
                raise ValueError(f"got {second.shape[0]} rows, expected heads of even width")
            turned = {
                keys[0]: first.T if name == TABLE else first,
                keys[1]: halves(second, heads) if heads else second,
            }
            own = {"r": rank, "lora_alpha": alpha or rank, "use_rslora": False, "lora_dropout": 0.0}
            read = lora.LORA.read(model.site(where).slice(), turned, own)
        except ValueError as error:
            raise FormatError(source, f"{name}: {error}") from error
        slices.setdefault(where, {})[index] = read
    return join(source, lora.LORA, model.sites, slices, {})


def _one_alpha(source: Path, fields: Mapping[str, Mapping]) -> float:
    """The alpha for which alpha / r is the scale of every module."""
    alphas: dict[float, str] = {}
    for module, own in fields.items():
        scale = scale_of(own["lora_alpha"], own["r"], own["use_rslora"])
        alpha = own["r"] * float(scale) if own["use_rslora"] else float(own["lora_alpha"])
        alphas.setdefault(alpha, module)
    if len(alphas) != 1 or 0.0 in alphas:
        listed = ", ".join(f"{alpha:g} at {module}" for alpha, module in list(alphas.items())[:3])
        raise FormatError(source, f"the file has one alpha, not 0, for all sites; got {listed}")
    return next(iter(alphas))


def _stored(source: Path, base: GgufBase, name: str, own: Arrays) -> Arrays:
    """The two tensors of one module, as llama.cpp stores them."""
    keys = lora.TABLE if lora.TABLE[0] in own else lora.MATRIX
    first, second = own[keys[0]], own[keys[1]]
    if (keys is lora.TABLE) != (name == TABLE) or first.ndim != 2:
        raise FormatError(source, f"{name}: llama.cpp adapts no convolution or other table")
    if name == TABLE and base.tied:
        raise FormatError(
            source, f"{name}: is the output layer as well, which llama.cpp cannot adapt; merge the "
            "adapter instead"
        )  # fmt: skip
    if heads := heads_of(base, name):
        second = neighbours(second, heads)
    tensors = {name + A: first.T if name == TABLE else first, name + B: second}
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise FormatError(source, f"{key}: got {tensor.dtype}, expected float32 or float16")
    return {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}


def _write(source: Path, base: GgufBase, alpha: float, tensors: Arrays) -> None:
    from gguf import GGUFWriter, Keys

    part = source.with_name(f".{source.name}.partial")
    try:
        writer = GGUFWriter(str(part), base.architecture)
        writer.add_string(Keys.General.TYPE, "adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for name in sorted(tensors):
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, source)
    finally:
        part.unlink(missing_ok=True)


def shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
    """The shapes of the weights that a file adapts.

    Args:
      path: the ``.gguf`` file.

    Returns:
      ``blk.3.attn_q`` -> (d_out, d_in); of the embedding table (rows, d_out).

    Raises:
      FormatError: as `load_gguf`.
    """
    by_module: dict[str, tuple[int, int]] = {}
    for name, parts in _read(Path(path), None)[1].items():
        d_in, d_out = parts["a"].shape[0 if name == TABLE else 1], len(parts["b"])
        by_module[name] = (d_in, d_out) if name == TABLE else (d_out, d_in)
    return by_module


def _read(source: Path, base: GgufBase | None) -> tuple[float, dict[str, Arrays]]:
    """(alpha, name -> {"a", "b"}) of a file."""
    reader = open_gguf(source)
    get = partial(field, source, reader)
    wanted = {"general.type": "adapter", "adapter.type": "lora"}
    if base is not None:
        wanted["general.architecture"] = base.architecture
    for name, expected in wanted.items():
        if (got := get(name)) != expected:
            raise FormatError(source, f"{name}: got {got!r}, expected {expected!r}")
    if reader.get_field("adapter.alora.invocation_tokens") is not None:
        raise FormatError(source, "adapter.alora.invocation_tokens: activated LoRA is not read")
    by_module: dict[str, Arrays] = {}
    for tensor in reader.tensors:
        end = next((end for end in (A, B) if tensor.name.endswith(end)), None)
        if end is None:
            raise FormatError(source, f"surplus tensor {tensor.name!r}, expected names in {A}, {B}")
        if tensor.tensor_type.name not in FLOATS:
            raise FormatError(
                source, f"{tensor.name}: got {tensor.tensor_type.name}, expected {list(FLOATS)}"
            )
        if tensor.data.ndim != 2:
            raise FormatError(source, f"{tensor.name}: got shape {tensor.data.shape}, expected 2-D")
        by_module.setdefault(tensor.name.removesuffix(end), {})[end[-1]] = np.array(tensor.data)
    if not by_module:
        raise FormatError(source, f"no tensor of an adapter; {keys_seen([])}")
    for name, parts in by_module.items():
        if parts.keys() != {"a", "b"}:
            raise FormatError(
                source, f"{name}: got lora_{sorted(parts)}, expected lora_a and lora_b"
            )
        if parts["a"].shape[name == TABLE] != parts["b"].shape[1]:
            raise FormatError(
                source, f"{name}: lora_a {parts['a'].shape} and lora_b {parts['b'].shape} have "
                "different ranks"
            )  # fmt: skip
        for end, array in parts.items():
            if not np.isfinite(array).all():
                raise FormatError(source, f"{name}.weight.lora_{end}: has NaN or infinite values")
    alpha = float(get("adapter.lora.alpha", 0.0))
    if not np.isfinite(alpha):
        raise FormatError(source, f"adapter.lora.alpha: got {alpha}, expected a number")
    return int(alpha) if alpha.is_integer() else alpha, by_module
