"""Trained vectors in PEFT's files: LN tuning, BEFT, and biases or norms next to another method.

=====================  ========================================  ==================================
what                   tensor of a vector [n]                    config
=====================  ========================================  ==================================
LN tuning              ``<norm>.ln_tuning_layers.weight, bias``  ``peft_type: LN_TUNING``
BEFT of biases         ``<module>.beft_bias`` [1, n]             ``peft_type: BEFT``
biases next to LoRA    ``<module>.bias``, of an adapted module   ``bias: all`` or ``lora_only``
                       ``<module>.base_layer.bias``
norms next to LoRA     ``<norm>.weight``, ``<norm>.bias``        ``modules_to_save``
=====================  ========================================  ==================================

All are whole vectors but BEFT's, which is added to a bias. The name map says which they are:
``LayerNorm[weight]``.

Source: peft 0.21.2, its files.
Deviates: modules are written with whole names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Site
from jlora.io.errors import FormatError, near
from jlora.io.names import NameMap
from jlora.io.peft.read import ROOT, stacked
from jlora.io.peft.table import Arrays, Fields, Read, Table, want_shape
from jlora.io.peft.vera_oft_ia3 import BEFT_TABLE, BIAS, LN_LAYERS, LN_TUNING
from jlora.methods.selective.beft import BEFT
from jlora.methods.selective.bitfit import BitFit
from jlora.methods.selective.ln_tuning import LNTuning

Places = Mapping[str, tuple[str, tuple[int, ...]]]  # torch parameter -> (site path, stack index)
Slices = dict[str, dict[tuple[int, ...], Read]]


def of_layers(
    path: Path, per_module: Mapping[str, Arrays], places: Places, sites: Mapping[str, Site]
) -> Slices:
    """The vectors of an LN tuning.

    Args:
      path: of the file, for errors.
      per_module: module -> suffix -> tensor.
      places: torch parameter -> (site path, stack index).
      sites: by path.

    Returns:
      Site path -> stack index -> what was read.

    Raises:
      FormatError: weights that are not vectors of the model and name map.
    """
    slices: Slices = {}
    for module, tensors in per_module.items():
        for key, tensor in tensors.items():
            name = f"{module}.{key.removeprefix(f'{LN_LAYERS}.')}"
            _put(path, slices, name, tensor, places, sites, LNTuning())
    return slices


def bias_modules(places: Places) -> Places:
    """The modules that have a bias.

    Args:
      places: torch parameter -> (site path, stack index).

    Returns:
      Module -> (site path, stack index) of its bias.
    """
    ends = {name.rpartition("."): where for name, where in places.items()}
    return {module: where for (module, _, leaf), where in ends.items() if leaf == "bias"}


def of_beft(
    path: Path, per_module: Mapping[str, Arrays], places: Places, sites: Mapping[str, Site]
) -> Slices:
    """What BEFT adds to biases.

    Args:
      path: of the file, for errors.
      per_module: module -> suffix -> tensor, of modules with a bias.
      places: torch parameter -> (site path, stack index).
      sites: by path.

    Returns:
      Site path -> stack index -> what was read.

    Raises:
      FormatError: one is not of the bias's size.
    """
    slices: Slices = {}
    for module, tensors in sorted(per_module.items()):
        name, added = f"{module}.bias", tensors[BIAS]
        size = sites[places[name][0]].d_out
        if added.shape != (1, size):
            raise FormatError(path, f"{module}.{BIAS} has shape {list(added.shape)}, expected "
                              f"[1, {size}]")  # fmt: skip
        _put(path, slices, name, added[0], places, sites, BEFT())
    return slices


def beft_side(
    path: Path, adapter: Adapter, names: NameMap
) -> tuple[Arrays, dict[str, Fields], Table]:
    """A BEFT as PEFT has it.

    Args:
      path: where it goes, for errors.
      adapter: whose sites of BEFT are written.
      names: from site paths to torch parameters.

    Returns:
      (tensors by key, config fields by module, the table of BEFT).

    Raises:
      FormatError: a vector that is not called a bias.
      ValueError: a vector without a name, or two of one.
    """
    keys, rows = {}, [site for site, method in adapter.sites if isinstance(method, BEFT)]
    for name, v in _by_name(adapter, rows, names).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "bias":
            raise FormatError(path, f"{name}: PEFT calls it {leaf!r}; BEFT is of biases")
        keys[f"{ROOT}{module}.{BIAS}"] = v[None]
    modules = [key.removeprefix(ROOT).removesuffix(f".{BIAS}") for key in keys]
    return keys, {module: {} for module in modules}, BEFT_TABLE


def _by_name(adapter: Adapter, rows: Sequence[Site], names: NameMap) -> Arrays:
    """The vectors of some sites by torch name; raises ValueError for one without, or two of one."""
    tensors: Arrays = {}
    for site in rows:
        v = np.asarray(adapter.trainable[site.path]["v"])
        if v.shape != (*site.stack, site.d_out):
            expected = (*site.stack, site.d_out)
            raise ValueError(f"{site.path}/v: got shape {v.shape}, expected {expected}")
        for index in np.ndindex(*site.stack):
            name = names.vector(site.path, index)
            if name in tensors:
                raise ValueError(f"name map: two slices are called {name!r}")
            tensors[name] = v[index]
    return tensors


def of_extras(path: Path, rest: Arrays, places: Places, sites: Mapping[str, Site]) -> Adapter:
    """Biases and norms that a file brings along, as an adapter of their own.

    Args:
      path: of the file, for errors.
      rest: tensors of no method, by key.
      places: torch parameter -> (site path, stack index).
      sites: by path.

    Returns:
      An adapter of `BitFit` and `LNTuning` sites.

    Raises:
      FormatError: weights that are not vectors of the model and name map.
    """
    slices: Slices = {}
    tensors = {torch_name(key): tensor for key, tensor in rest.items()}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        alone = leaf == "bias" and f"{module}.weight" not in tensors
        _put(path, slices, name, tensor, places, sites, BitFit() if alone else LNTuning())
    trainable, frozen, done = {}, {}, []
    for where in sorted(slices):
        method, trainable[where], frozen[where] = stacked(path, sites[where], slices[where], False)
        done.append((sites[where], method))
    return Adapter(trainable, frozen, tuple(done))


def torch_name(key: str) -> str:
    """The base's name of a weight in PEFT's file.

    Args:
      key: of the tensor.

    Returns:
      The torch parameter.
    """
    return key.removeprefix(ROOT).replace(".base_layer.", ".")


def _put(
    path: Path,
    slices: Slices,
    name: str,
    tensor: np.ndarray,
    places: Places,
    sites: Mapping[str, Site],
    method: Method,
) -> None:
    if name not in places:
        raise FormatError(
            path,
            f"{name!r} is no vector of this model and name map, which names them as "
            f"'module[weight]'; nearest: {near(name, places) or 'none'}",
        )
    where, index = places[name]
    try:
        want_shape(name, tensor, (sites[where].d_out,))
    except ValueError as error:
        raise FormatError(path, str(error)) from error
    slices.setdefault(where, {})[index] = Read(method, {"v": tensor}, {})


def together(adapter: Adapter, vectors: Adapter) -> Adapter:
    """One adapter of two that have no site in common.

    Args:
      adapter: the one.
      vectors: the other.

    Returns:
      All sites, sorted by path.
    """
    rows = sorted((*adapter.sites, *vectors.sites), key=lambda row: row[0].path)
    return Adapter(
        {**adapter.trainable, **vectors.trainable},
        {**adapter.frozen, **vectors.frozen},
        tuple(rows),
    )


def split(path: Path, adapter: Adapter, names: NameMap) -> tuple[Adapter, Arrays, bool]:
    """Takes the vectors out of an adapter.

    Args:
      path: where they go, for errors.
      adapter: of any sites.
      names: from site paths to torch parameters.

    Returns:
      (the adapter without its vectors, these by torch name, whether all are LN tuning).

    Raises:
      FormatError: a bias by LN tuning whose gain is not trained, next to another method.
      ValueError: a vector without a name, or two of one.
    """
    rows = [(s, m) for s, m in adapter.sites if isinstance(m, LNTuning | BitFit)]
    if not rows:
        return adapter, {}, False
    tensors = _by_name(adapter, [site for site, _ in rows], names)
    kept = tuple(row for row in adapter.sites if row not in rows)
    alone = not kept and all(isinstance(m, LNTuning) for _, m in rows)
    for site, method in rows:
        module, _, leaf = names.vector(site.path, (0,) * len(site.stack)).rpartition(".")
        if leaf != "bias" and isinstance(method, BitFit):
            raise FormatError(path, f"{site.path}: PEFT calls it {leaf!r}; BitFit is of biases")
        gained = f"{module}.weight" in tensors
        if not alone and leaf == "bias" and gained == isinstance(method, BitFit):
            other = "LNTuning" if gained else "BitFit"
            raise FormatError(
                path,
                f"{site.path}: next to another method PEFT has biases alone (BitFit) or gain and "
                f"bias of a norm (LNTuning); got {type(method).__name__}, expected {other}",
            )
    return adapter.replace(sites=kept), tensors, alone


def torch_side(tensors: Arrays) -> tuple[Arrays, dict[str, Fields], Table]:
    """An LN tuning as PEFT has it.

    Args:
      tensors: vectors by torch name.

    Returns:
      (tensors by key, config fields by module, the table of LN tuning).
    """
    keys = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        keys[f"{ROOT}{module}.{LN_LAYERS}.{leaf}"] = tensor
    return keys, {name.rpartition(".")[0]: {} for name in tensors}, LN_TUNING
