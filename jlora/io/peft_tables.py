"""What PEFT's file holds for each method: type, key suffixes, layouts, config fields.

A method may bring its own `Table` as its attribute `peft`; those of the library's methods that
PEFT knows as well are in `TABLES`. `io/peft.py` reads and writes through them and knows no method.

Layouts: torch keeps W as [out, in], so PEFT's ``lora_A.weight`` [r, in] is our `a` transposed and
``lora_B.weight`` [out, r] our `b` transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.core.adapter import Method, Site
from jlora.methods.lora import LoRA

Arrays = dict[str, np.ndarray]


class Slice(NamedTuple):
    """One un-stacked site as PEFT has it."""

    tensors: Arrays  # key suffix -> array in torch's layout
    fields: dict[str, Any]  # config fields of this module


class Read(NamedTuple):
    """One un-stacked site as jlora has it."""

    method: Method
    trainable: Arrays
    frozen: Arrays


@dataclasses.dataclass(frozen=True)
class Table:
    """How adapters of one method lie in PEFT's files.

    Attributes:
      type: PEFT's ``peft_type``.
      method: the class whose instances `write` takes and `read` returns.
      layouts: the sets of key suffixes a module may have, one of them whole.
      fields: config fields that `write` gives and `read` gets, with PEFT's defaults.
      write: (method, site, arrays of one slice) -> `Slice`, or None where the slice is no adapter
        (zero padding of a site of which only some layers are adapted).
      read: (site, tensors by suffix, fields) -> `Read`; raises ValueError.
      patterns: field -> the config field that overrides it by module.
      fixed: config fields of which only this value can be represented.
      choose: config fields that tell this table from others of the same `type`.
      free: config fields that do not change the saved function, with what to write.
      allowed: of a free field, the values that indeed leave the function alone.
      sparse: absent modules of a stacked site may be filled with zeros.
    """

    type: str
    method: type[Method]
    layouts: tuple[tuple[str, ...], ...]
    fields: Mapping[str, Any]
    write: Callable[[Any, Site, Arrays], Slice | None]
    read: Callable[[Site, Arrays, Mapping[str, Any]], Read]
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choose: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    free: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    sparse: bool = False


# --- LoRA: W' = W + scale A B ------------------------------------------------------------------

LORA_MATRIX = ("lora_A.weight", "lora_B.weight")
LORA_TABLE = ("lora_embedding_A", "lora_embedding_B")  # a looked-up table [rows, d_out]
RANK_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
LORA_FREE = {
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "velora_config": None,
}
LORA_FIXED = {
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# The other initialisations change the base weights: the file alone is not the function.
LORA_ALLOWED = {
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "bias": ("none", "all", "lora_only"),
}


def lora_scale(alpha: float, rank: int, rslora: bool) -> np.ndarray:
    """PEFT's scaling, alpha / r or alpha / sqrt(r), as float32."""
    return np.float32(alpha / (math.sqrt(rank) if rslora else rank)).reshape(())


def lora_alpha(method: Any, scale: np.ndarray, rank: int, rslora: bool) -> float:
    """The alpha whose `lora_scale` at `rank` is exactly `scale`, a round number where one is."""
    exact = float(scale) * (math.sqrt(rank) if rslora else rank)
    for alpha in (method.alpha, round(exact, 4), exact):
        if lora_scale(alpha, rank, rslora) == scale:
            return int(alpha) if float(alpha).is_integer() else float(alpha)
    raise ValueError(f"no alpha gives the scale {float(scale)!r} at rank {rank}")


def true_rank(a: np.ndarray, b: np.ndarray) -> int:
    """Rank without zero padding: trailing components where `a` [i, r] and `b` [r, o] are zero."""
    used = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    return int(used[-1]) + 1 if used.size else 0


def _write_lora(method: LoRA, site: Site, p: Arrays) -> Slice | None:
    rank = true_rank(p["a"], p["b"])
    if rank == 0:
        return None
    keys = LORA_TABLE if "gather" in site.ops else LORA_MATRIX
    fields = {
        "r": rank,
        "lora_alpha": lora_alpha(method, p["scale"], rank, method.rslora),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
    }
    return Slice(dict(zip(keys, (p["a"][:, :rank].T, p["b"][:rank].T), strict=True)), fields)


def _read_lora(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    keys = LORA_TABLE if "gather" in site.ops else LORA_MATRIX
    if not set(keys) <= set(t):
        raise ValueError(f"got {sorted(t)}, expected {list(keys)} at a {site.ops or 'matrix'} site")
    rank, alpha, rslora = fields["r"], fields["lora_alpha"], fields["use_rslora"]
    method = LoRA(rank=rank, alpha=alpha, rslora=rslora, dropout=fields["lora_dropout"])
    a, b = (t[key].T for key in keys)
    want_shape(keys[0], t[keys[0]], (rank, site.d_in))
    want_shape(keys[1], t[keys[1]], (site.d_out, rank))
    return Read(method, {"a": a, "b": b}, {"scale": lora_scale(alpha, rank, rslora)})


def want_shape(key: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` has `shape`."""
    if array.shape != shape:
        raise ValueError(f"{key} has shape {list(array.shape)}, expected {list(shape)}")


LORA = Table(
    type="LORA",
    method=LoRA,
    layouts=(LORA_MATRIX, LORA_TABLE),
    fields={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    write=_write_lora,
    read=_read_lora,
    patterns=RANK_PATTERNS,
    fixed=LORA_FIXED,
    choose={"use_dora": False},
    free=LORA_FREE,
    allowed=LORA_ALLOWED,
    sparse=True,
)

TABLES: tuple[Table, ...] = (LORA,)


def table_for(config: Mapping[str, Any], tables: tuple[Table, ...] = TABLES) -> Table:
    """The table that reads files of this config.

    Raises:
      ValueError: the library has no method for its ``peft_type``.
    """
    same = [table for table in tables if table.type == config["peft_type"]]
    for table in same:
        if all(bool(config.get(k)) == v for k, v in table.choose.items()):
            return table
    known = sorted({table.type for table in tables})
    raise ValueError(f"peft_type {config['peft_type']!r} cannot be read; these can: {known}")


def table_of(method: Method) -> Table:
    """The table of a method: its own (`method.peft`) or the library's.

    Raises:
      ValueError: PEFT has no such method.
    """
    own = getattr(method, "peft", None)
    if own is not None:
        return own
    for table in TABLES:
        if type(method) is table.method:
            return table
    raise ValueError(
        f"PEFT's files have no place for {type(method).__name__}; it can be written for "
        f"{sorted(t.method.__name__ for t in TABLES)} (or give the method a `peft` table)"
    )
