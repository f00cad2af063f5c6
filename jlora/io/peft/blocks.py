"""PEFT tables of methods that work block by block: MiSS, BAT, C3A, GraLoRA.

=========  ==================================================  ====================================
type       PEFT's tensors                                      ours
=========  ==================================================  ====================================
MISS       miss_block [r, out], "mini": [r, mini_r]            MiSS: d
MISS, bat  miss_block [out / r, r, r]                          BAT: b, every block transposed
C3A        c3a_kernel [out / b, in / b, b]                     C3A: kernel
GRALORA    gralora_A [k, in / k, r], gralora_B [k, r, out/k]   GraLoRA: a, b
           gralora_A_general, gralora_B_general                a_all, b_all, transposed
=========  ==================================================  ====================================

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from jlora.core.site import Site
from jlora.io.peft.table import (
    Arrays,
    Fields,
    Read,
    Slice,
    Table,
    alpha_of,
    scale_of,
    want_shape,
)
from jlora.methods.blocks.bat import BAT
from jlora.methods.blocks.c3a import C3A
from jlora.methods.blocks.gralora import GraLoRA
from jlora.methods.blocks.miss import MiSS
from jlora.types import Json


def divides(name: str, block: int, site: Site) -> None:
    """Refuses a block that does not divide both sides of the matrix.

    Args:
      name: of the field, for the message.
      block: its value.
      site: of the weight.

    Raises:
      ValueError: it does not, or is less than 1.
    """
    if block < 1 or site.d_in % block or site.d_out % block:
        raise ValueError(f"{name} = {block}, expected a divisor of {site.d_in} and {site.d_out}")


# --- MiSS ---------------------------------------------------------------------------------------


def _write_miss(method: MiSS, site: Site, p: Arrays) -> Slice:
    fields = {"r": method.rank, "mini_r": method.mini or 1, "mini": method.mini is not None}
    return Slice({"miss_block": p["d"]}, fields)


def _read_miss(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, mini, d = fields["r"], fields["mini_r"], t["miss_block"]
    if rank > site.d_in:
        raise ValueError(f"r = {rank}, expected at most {site.d_in} inputs")
    whole = d.shape == (rank, site.d_out)
    if not whole and (mini < 1 or site.d_out % mini):
        raise ValueError(f"mini_r = {mini}, expected a divisor of {site.d_out} outputs")
    want_shape("miss_block", d, (rank, site.d_out if whole else mini))
    return Read(MiSS(rank, None if whole else mini), {"d": d}, {})


def _settle_miss(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """`init_weights` says which of the two forms all modules have."""
    forms = {fields["mini"] for fields in modules.values()}
    if len(forms) > 1:
        raise ValueError("PEFT's MISS has `mini` for all modules or none; got both")
    kept = {m: {k: v for k, v in f.items() if k != "mini"} for m, f in modules.items()}
    return kept, {"init_weights": "mini" if forms == {True} else True}


def _write_bat(method: BAT, site: Site, p: Arrays) -> Slice:
    return Slice({"miss_block": p["b"].swapaxes(1, 2)}, {"r": method.block})


def _read_bat(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    n = fields["r"]
    divides("r", n, site)
    want_shape("miss_block", t["miss_block"], (site.d_out // n, n, n))
    return Read(BAT(n), {"b": t["miss_block"].swapaxes(1, 2)}, {})


# --- C3A ----------------------------------------------------------------------------------------


def _write_c3a(method: C3A, site: Site, p: Arrays) -> Slice:
    return Slice({"c3a_kernel": p["kernel"]}, {"block_size": method.block})


def _read_c3a(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    n = fields["block_size"]
    divides("block_size", n, site)
    want_shape("c3a_kernel", t["c3a_kernel"], (site.d_out // n, site.d_in // n, n))
    return Read(C3A(n), {"kernel": t["c3a_kernel"]}, {})


# --- GraLoRA ------------------------------------------------------------------------------------

GRALORA_KEYS = ("gralora_A", "gralora_B")
GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


def _write_gralora(method: GraLoRA, site: Site, p: Arrays) -> Slice:
    tensors = {"gralora_A": p["a"], "gralora_B": p["b"]}
    if method.hybrid:
        tensors |= {GENERAL[0]: p["a_all"].T, GENERAL[1]: p["b_all"].T}
    fields = {
        "r": method.rank,
        "alpha": alpha_of(method, p["scale"], method.rank + method.hybrid),
        "gralora_k": method.blocks,
        "hybrid_r": method.hybrid,
    }
    return Slice(tensors, fields)


def _read_gralora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, k, hybrid = fields["r"], fields["gralora_k"], fields["hybrid_r"]
    divides("gralora_k", k, site)
    method = GraLoRA(rank, fields["alpha"], k, hybrid)
    want_shape("gralora_A", t["gralora_A"], (k, site.d_in // k, rank))
    want_shape("gralora_B", t["gralora_B"], (k, rank, site.d_out // k))
    p = {"a": t["gralora_A"], "b": t["gralora_B"]}
    if bool(hybrid) != (GENERAL[0] in t):
        raise ValueError(f"got {sorted(t)} with hybrid_r = {hybrid}")
    if hybrid:
        want_shape(GENERAL[0], t[GENERAL[0]], (hybrid, site.d_in))
        want_shape(GENERAL[1], t[GENERAL[1]], (site.d_out, hybrid))
        p |= {"a_all": t[GENERAL[0]].T, "b_all": t[GENERAL[1]].T}
    return Read(method, p, {"scale": scale_of(fields["alpha"], rank + hybrid)})


BAT_TABLE = Table(
    type="MISS",
    method=BAT,
    layouts=(("miss_block",),),
    fields={"r": 64},
    write=_write_bat,
    read=_read_bat,
    choose={"init_weights": "bat"},
    free={"bias": "none", "mini_r": 1, "miss_dropout": 0.0},
)

MISS = Table(
    type="MISS",
    method=MiSS,
    layouts=(("miss_block",),),
    fields={"r": 64, "mini_r": 1},
    write=_write_miss,
    read=_read_miss,
    allowed={"init_weights": (True, False, "mini")},
    free={"bias": "none", "init_weights": True, "miss_dropout": 0.0},
    settle=_settle_miss,
)

C3A_TABLE = Table(
    type="C3A",
    method=C3A,
    layouts=(("c3a_kernel",),),
    fields={"block_size": 256},
    write=_write_c3a,
    read=_read_c3a,
    patterns={"block_size": "block_size_pattern"},
    free={"bias": "none", "init_weights": "xavier_uniform"},
    lacks=("exclude_modules",),
)

GRALORA = Table(
    type="GRALORA",
    method=GraLoRA,
    layouts=(GRALORA_KEYS, (*GRALORA_KEYS, *GENERAL)),
    fields={"r": 32, "alpha": 64, "gralora_k": 2, "hybrid_r": 0},
    write=_write_gralora,
    read=_read_gralora,
    free={"bias": "none", "fan_in_fan_out": False, "gralora_dropout": 0.0, "init_weights": True},
    lacks=("exclude_modules",),
)
