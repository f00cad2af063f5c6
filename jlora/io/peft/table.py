"""The contract of a method with PEFT's files: type, key suffixes, layouts, config fields.

A method may bring its own `Table` as its attribute `peft`; those of the library's methods that
PEFT knows as well are in `peft_lora`, `peft_lycoris` and `peft_others`. `io/peft.py` works through
them and knows no method.

Layouts: torch keeps W as [out, in], so a matrix of PEFT is ours transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from jlora.core.method import Method
from jlora.core.site import Site
from jlora.types import Dynamic, Json

Arrays = dict[str, np.ndarray]
Fields = dict[str, Json]


class Slice(NamedTuple):
    """One un-stacked site as PEFT has it."""

    tensors: Arrays  # key suffix -> array in torch's layout
    fields: Fields  # config fields of this module


class Read(NamedTuple):
    """One un-stacked site as jlora has it."""

    method: Method
    trainable: Arrays
    frozen: Arrays


def _unchanged(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    return modules, {}


@dataclasses.dataclass(frozen=True)
class Table:
    """How adapters of one method lie in PEFT's files.

    Attributes:
      type: PEFT's ``peft_type``.
      method: the class whose instances `write` takes and `read` returns.
      layouts: the sets of key suffixes a module may have, one of them whole.
      fields: config fields that `write` gives and `read` gets, with PEFT's defaults.
      write: (method, site, arrays of one slice) -> `Slice`, or None where the slice is no adapter
        (zero padding of a site of which only some layers are adapted); raises ValueError.
      read: (site, tensors by suffix, shared ones too, fields) -> `Read`; raises ValueError.
      patterns: field -> the config field that overrides it by module.
      fixed: config fields of which only this value can be represented.
      choose: config fields that tell this table from others of the same `type`.
      free: config fields that do not change the saved function, with what to write.
      masks: (config field, suffix): the field has a list of booleans by ``module.suffix``, which
        `read` gets, and `write` gives, as the field ``mask`` (None: none).
      allowed: of a field, the values that can be read.
      reasons: of a field, why its other values cannot.
      writes: whether adapters of the method are written with this table as well.
      needs: fields that must be there: their default has changed over time.
      lacks: of the fields that say which modules are adapted, those this type does not have.
      sparse: absent modules of a stacked site may be filled with zeros.
      convolves: kernels of convolutions can be written and read as well.
      biased: PEFT also scales the module's bias, so there must be none.
      settle: (module -> fields) -> (the same, other config fields), before they are combined.
      shared: keys below ``base_model.`` of tensors that all modules share.
      families: first parts of the keys of further ones, of which the file has any number:
        ``tinylora_v`` of ``tinylora_v.0``, ``tinylora_v.1``, ...
      relate: (config, un-stacked site and tensors of each module, shared tensors) -> further arrays
        of each module, for `read`, where one module's meaning depends on the others or on its name;
        raises ValueError. None: it does not.
      weighs: `read` gets the base matrix [in, out] too, under the key ``base``: what the file says
        is relative to the weight that it was made for.
      copied: the shared tensors are in the file once more under every module.
      write_shared: shared arrays -> tensors by key.
      regrow: (config, un-stacked site and tensors of each module) -> shared tensors by key, where
        the file has only their seed; None where it must have them.
      read_shared: tensors by key -> shared arrays.
      trains_shared: the shared arrays are trained, not frozen.
    """

    type: str
    method: type[Method]
    layouts: tuple[tuple[str, ...], ...]
    fields: Mapping[str, Json]
    write: Callable[[Dynamic, Site, Arrays], Slice | None]
    read: Callable[[Site, Arrays, Mapping[str, Json]], Read]
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    choose: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    free: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    masks: tuple[str, str] | None = None
    allowed: Mapping[str, tuple[Json, ...]] = dataclasses.field(default_factory=dict)
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    writes: bool = True
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    sparse: bool = False
    convolves: bool = False
    biased: Callable[[Method], bool] = lambda method: False
    settle: Callable[[Mapping[str, Fields]], tuple[Mapping[str, Fields], Fields]] = _unchanged
    shared: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    relate: (
        Callable[
            [Mapping[str, Json], Mapping[str, tuple[Site, Arrays]], Arrays], Mapping[str, Arrays]
        ]
        | None
    ) = None
    copied: bool = False
    weighs: bool = False
    write_shared: Callable[[Arrays], Arrays] = dict
    read_shared: Callable[[Arrays], Arrays] = dict
    trains_shared: bool = False
    regrow: Callable[[Mapping[str, Json], Sequence[tuple[Site, Arrays]]], Arrays | None] | None = (
        None
    )


def want_shape(key: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape.

    Args:
      key: its name, for the message.
      array: the tensor.
      shape: what it must be.

    Raises:
      ValueError: it is another one.
    """
    if array.shape != shape:
        raise ValueError(f"{key} has shape {list(array.shape)}, expected {list(shape)}")


def check_site(table: Table, site: Site) -> None:
    """Refuses a convolution that a table has no layout for.

    Args:
      table: of the method.
      site: of the weight.

    Raises:
      ValueError: it is one.
    """
    if "conv" in site.ops and not table.convolves:
        raise ValueError(f"{table.method.__name__} of a convolution has no layout here")


def scale_of(alpha: float, rank: int, rslora: bool = False) -> Float32[np.ndarray, ""]:
    """PEFT's scaling: alpha / r, or with rsLoRA alpha / sqrt(r).

    Args:
      alpha: of the config.
      rank: r.
      rslora: whether the square root is taken; False, as in PEFT.

    Returns:
      float32 [].

    Raises:
      ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}, expected at least 1")
    return np.asarray(alpha / (math.sqrt(rank) if rslora else rank), np.float32)


def alpha_of(
    method: Dynamic, scale: Float32[np.ndarray, ""], rank: int, rslora: bool = False
) -> float:
    """The alpha that gives a scale exactly, a round number where one does.

    Args:
      method: its `alpha` is tried first.
      scale: float32 [].
      rank: r.
      rslora: as for `scale_of`.

    Returns:
      alpha with scale_of(alpha, rank, rslora) == scale; an int where it is whole.

    Raises:
      ValueError: no alpha gives that scale, or rank < 1.
    """
    exact = float(scale) * (math.sqrt(rank) if rslora else rank)
    for alpha in (method.alpha, round(exact, 4), exact):
        if scale_of(alpha, rank, rslora) == scale:
            return int(alpha) if float(alpha).is_integer() else float(alpha)
    raise ValueError(f"no alpha gives the scale {float(scale)!r} at rank {rank}")


def trim(p: Arrays, rank_axes: Mapping[str, int]) -> tuple[int, Arrays]:
    """Arrays without zero padding: trailing components that are zero in every factor.

    Args:
      p: arrays of one slice by name.
      rank_axes: name -> rank axis, from the end.

    Returns:
      (rank, all arrays by name, cut to it); rank 0 where all factors are zero.
    """
    ranked = {name: axis for name, axis in rank_axes.items() if name in p}
    rank = 0
    for name, axis in ranked.items():
        used = np.flatnonzero(np.moveaxis(p[name], axis, 0).reshape(p[name].shape[axis], -1).any(1))
        rank = max(rank, int(used[-1]) + 1 if used.size else 0)
    cut = {name: np.moveaxis(np.moveaxis(p[name], a, 0)[:rank], 0, a) for name, a in ranked.items()}
    return rank, {**p, **cut}
