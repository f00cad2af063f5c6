"""PEFT tables of LoHa, of convolutions too, and LoKr (LyCORIS in PEFT's layout)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.core.adapter import Site
from jlora.io import torch_layout
from jlora.io.peft_table import Arrays, Read, Slice, Table, alpha_of, scale_of, trim, want_shape
from jlora.methods.loha import LoHa
from jlora.methods.lokr import LoKr, split

PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
LYCORIS_FREE = {
    "init_weights": True,
    "module_dropout": 0.0,
    "rank_dropout": 0.0,
    "use_effective_conv2d": False,  # of convolutions only
}

# --- LoHa: delta^T = scale (w1_a w1_b) * (w2_a w2_b) --------------------------------------------

HADA = {"hada_w1_a": "b1", "hada_w1_b": "a1", "hada_w2_a": "b2", "hada_w2_b": "a2"}


def _write_loha(method: LoHa, site: Site, p: Arrays) -> Slice | None:
    rank, p = trim(p, method.rank_axes)
    if rank == 0:
        return None
    fields = {"r": rank, "alpha": alpha_of(method, p["scale"], rank)}
    return Slice(write_hada(site, p), fields)


def write_hada(site: Site, p: Arrays) -> Arrays:
    """The four factors by key."""
    return {
        key: torch_layout.flat(site, p[name]) if name[0] == "a" else p[name].T
        for key, name in HADA.items()
    }


def _read_loha(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    rank, alpha = fields["r"], fields["alpha"]
    for key in HADA:
        want_shape(key, t[key], (site.d_out, rank) if key.endswith("a") else (rank, site.d_in))
    trainable = {
        name: torch_layout.of_flat(site, t[key]) if name[0] == "a" else t[key].T
        for key, name in HADA.items()
    }
    return Read(LoHa(rank=rank, alpha=alpha), trainable, {"scale": scale_of(alpha, rank)})


# --- LoKr: delta^T = scale w1 (x) w2, each whole or a product -----------------------------------

WHOLE = {"lokr_w1": "w1", "lokr_w2": "w2"}
LOKR_LAYOUTS = tuple(
    (*first, *second)
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
PARTS = {"lokr_w1_a": "b1", "lokr_w1_b": "a1", "lokr_w2_a": "b2", "lokr_w2_b": "a2"}


def _lokr_shapes(site: Site, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes that PEFT makes for one module."""
    rank, factor = fields["r"], fields["decompose_factor"]
    if factor != -1 and factor < 1:
        raise ValueError(f"decompose_factor = {factor}, expected -1 or at least 1")
    (i1, i2), (o1, o2) = (split(d, None if factor < 0 else factor) for d in (site.d_in, site.d_out))
    shapes: dict[str, tuple[int, ...]] = {}
    for n, rows, cols, parts in (
        (1, o1, i1, fields["decompose_both"] and rank < max(o1, i1) / 2),
        (2, o2, i2, rank < max(o2, i2) / 2),
    ):
        if parts:
            shapes |= {f"lokr_w{n}_a": (rows, rank), f"lokr_w{n}_b": (rank, cols)}
        else:
            shapes[f"lokr_w{n}"] = (rows, cols)
    return shapes


def _check_lokr(site: Site, t: Arrays, fields: Mapping[str, Any]) -> None:
    got, want = {key: array.shape for key, array in t.items()}, _lokr_shapes(site, fields)
    if got != want:
        raise ValueError(f"got {got}, PEFT makes {want} of {dict(fields)}")


def _write_lokr(method: LoKr, site: Site, p: Arrays) -> Slice | None:
    if not any(array.any() for name, array in p.items() if name != "scale"):
        return None
    axes = {name: axis for name, axis in method.rank_axes.items() if name in p}
    rank, p = trim(p, axes) if axes else (method.rank, p)
    keys = {**WHOLE, **PARTS}
    tensors = {key: p[name].T for key, name in keys.items() if name in p}
    fields = {
        "r": rank,
        "alpha": alpha_of(method, p["scale"], rank),
        "decompose_both": method.decompose_both,
        "decompose_factor": -1 if method.factor is None else method.factor,
    }
    _check_lokr(site, tensors, fields)
    return Slice(tensors, fields)


def _read_lokr(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    _check_lokr(site, t, fields)
    rank, alpha, factor = fields["r"], fields["alpha"], fields["decompose_factor"]
    method = LoKr(rank, alpha, None if factor == -1 else factor, fields["decompose_both"])
    keys = {**WHOLE, **PARTS}
    trainable = {keys[key]: array.T for key, array in t.items()}
    return Read(method, trainable, {"scale": scale_of(alpha, rank)})


LOHA = Table(
    type="LOHA",
    method=LoHa,
    layouts=(tuple(HADA),),
    fields={"r": 8, "alpha": 8},
    write=_write_loha,
    read=_read_loha,
    patterns=PATTERNS,
    free=LYCORIS_FREE,
    sparse=True,
    convolves=True,
)

LOKR = Table(
    type="LOKR",
    method=LoKr,
    layouts=LOKR_LAYOUTS,
    fields={"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1},
    write=_write_lokr,
    read=_read_lokr,
    patterns=PATTERNS,
    free={**LYCORIS_FREE, "rank_dropout_scale": False},
    sparse=True,
)
