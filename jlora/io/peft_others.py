"""PEFT tables beside the LoRA family: LoHa, LoKr, VeRA, OFT, IA3; all for matrices [out, in]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.core.adapter import Site
from jlora.io.peft_table import (
    Arrays,
    Fields,
    Read,
    Slice,
    Table,
    alpha_of,
    scale_of,
    trim,
    want_shape,
)
from jlora.methods.ia3 import IA3
from jlora.methods.loha import LoHa
from jlora.methods.lokr import LoKr, split
from jlora.methods.oft import OFT
from jlora.methods.vera import VeRA

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
    return Slice({key: p[name].T for key, name in HADA.items()}, fields)


def _read_loha(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    rank, alpha = fields["r"], fields["alpha"]
    for key in HADA:
        want_shape(key, t[key], (site.d_out, rank) if key.endswith("a") else (rank, site.d_in))
    trainable = {name: t[key].T for key, name in HADA.items()}
    return Read(LoHa(rank=rank, alpha=alpha), trainable, {"scale": scale_of(alpha, rank)})


# --- LoKr: delta^T = scale w1 (x) w2, each whole or a product -----------------------------------

WHOLE = {"lokr_w1": "w1", "lokr_w2": "w2"}
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


# --- VeRA: delta^T = diag(b) B diag(d) A, bases shared ------------------------------------------


def _write_vera(method: VeRA, site: Site, p: Arrays) -> Slice | None:
    if not p["b"].any() and not p["d"].any():
        return None
    if not np.array_equal(p["rows"], np.arange(site.d_in)):
        raise ValueError("PEFT's VeRA takes the first rows of the basis; got others")
    return Slice({"vera_lambda_b": p["b"], "vera_lambda_d": p["d"]}, {"r": p["d"].size})


def _read_vera(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    want_shape("vera_lambda_b", t["vera_lambda_b"], (site.d_out,))
    want_shape("vera_lambda_d", t["vera_lambda_d"], (fields["r"],))
    for key, need in (("vera_A", site.d_in), ("vera_B", site.d_out)):
        shape = t[key].shape
        rank, size = (shape if key == "vera_A" else shape[::-1]) if len(shape) == 2 else (0, 0)
        if rank != fields["r"] or size < need:
            raise ValueError(
                f"{key} has rank {rank} and size {size}, expected {fields['r']}, {need}"
            )
    trainable = {"b": t["vera_lambda_b"], "d": t["vera_lambda_d"]}
    return Read(VeRA(fields["r"]), trainable, {"rows": np.arange(site.d_in, dtype=np.int32)})


def _write_bases(shared: Arrays) -> Arrays:
    return {"vera_A": shared["basis_a"].T, "vera_B": shared["basis_b"].T}


def _read_bases(t: Arrays) -> Arrays:
    return {"basis_a": t["vera_A"].T, "basis_b": t["vera_B"].T}


# --- OFT: x R W ---------------------------------------------------------------------------------


def _write_oft(method: OFT, site: Site, p: Arrays) -> Slice:
    if method.terms in (2, 3):
        raise ValueError(f"PEFT has another series for {method.terms} terms; expected 4 or more")
    exact = method.terms is None  # PEFT's exact form is the transpose of its series: -Q
    fields = {
        "block_share": method.share,
        "num_cayley_neumann_terms": 5 if exact else method.terms,
        "oft_block_size": method.block,
        "r": 1 if method.share else p["q"].shape[0],
        "use_cayley_neumann": not exact,
    }
    return Slice({"oft_R.weight": -p["q"] if exact else p["q"]}, fields)


def _read_oft(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    q, share = t["oft_R.weight"], fields["block_share"]
    block = (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2
    if block < 2 or site.d_in % block:
        raise ValueError(f"oft_R.weight {list(q.shape)}: blocks of {block} in {site.d_in} inputs")
    want_shape("oft_R.weight", q, (1 if share else site.d_in // block, block * (block - 1) // 2))
    exact, terms = not fields["use_cayley_neumann"], fields["num_cayley_neumann_terms"]
    if not exact and terms < 3:
        raise ValueError(f"num_cayley_neumann_terms = {terms}, expected 3 or more")
    method = OFT(block=block, terms=None if exact else max(terms, 4), share=share)
    return Read(method, {"q": -q if exact else q}, {})


def _settle_oft(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """One of block size and number of blocks is 0 and follows from the other, for all modules."""
    zero = "r" if len({f["oft_block_size"] for f in modules.values()}) == 1 else "oft_block_size"
    return {module: {**fields, zero: 0} for module, fields in modules.items()}, {}


# --- IA3: y * l or x * l ------------------------------------------------------------------------


def _write_ia3(method: IA3, site: Site, p: Arrays) -> Slice:
    out = method.side == "out"
    tensors = {"ia3_l": p["l"][:, None] if out else p["l"][None, :]}
    return Slice(tensors, {"feedforward_modules": not out})


def _read_ia3(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    size, side = (site.d_in, "in") if t["ia3_l"].shape[0] == 1 else (site.d_out, "out")
    want_shape("ia3_l", t["ia3_l"], (1, size) if side == "in" else (size, 1))
    return Read(IA3(side=side), {"l": t["ia3_l"].reshape(size)}, {})


def _settle_ia3(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """PEFT lists the modules that scale their input."""
    inner = sorted(module for module, fields in modules.items() if fields["feedforward_modules"])
    return {module: {} for module in modules}, {"feedforward_modules": inner}


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
)

LOKR = Table(
    type="LOKR",
    method=LoKr,
    layouts=tuple(
        (*first, *second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    fields={"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1},
    write=_write_lokr,
    read=_read_lokr,
    patterns=PATTERNS,
    free={**LYCORIS_FREE, "rank_dropout_scale": False},
    sparse=True,
)

VERA = Table(
    type="VERA",
    method=VeRA,
    layouts=(("vera_lambda_b", "vera_lambda_d"),),
    fields={"r": 256},
    write=_write_vera,
    read=_read_vera,
    free={
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
    },
    lacks=("exclude_modules",),
    sparse=True,
    shared=("vera_A", "vera_B"),
    write_shared=_write_bases,
    read_shared=_read_bases,
)

OFT_TABLE = Table(
    type="OFT",
    method=OFT,
    layouts=(("oft_R.weight",),),
    fields={
        "block_share": False,
        "num_cayley_neumann_terms": 5,
        "oft_block_size": 32,
        "r": 0,
        "use_cayley_neumann": True,
    },
    write=_write_oft,
    read=_read_oft,
    fixed={"coft": False},
    free={
        "bias": "none",
        "eps": 6e-5,  # of coft only
        "fan_in_fan_out": False,
        "init_weights": True,
        "module_dropout": 0.0,
    },
    needs=("use_cayley_neumann", "num_cayley_neumann_terms"),
    settle=_settle_oft,
)

IA3_TABLE = Table(
    type="IA3",
    method=IA3,
    layouts=(("ia3_l",),),
    fields={},
    write=_write_ia3,
    read=_read_ia3,
    free={"fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True},
    lacks=("layers_pattern", "layers_to_transform"),
    biased=lambda method: isinstance(method, IA3) and method.side == "out",
    settle=_settle_ia3,
)
