"""PEFT's table of TinyLoRA.

=========  ==================================================  ====================================
type       PEFT's tensors                                      ours
=========  ==================================================  ====================================
TINYLORA   tinylora_A [r, in], tinylora_B [out, r]             a, b, transposed
           tinylora_P [k, r, r]                                p, each transposed
           of all: tinylora_v.g [k]                            v [groups, k]
           of a table: tinylora_A [r, out], _B [rows, r], _P   b, a, p
=========  ==================================================  ====================================

TinyLoRA's modules have a number: it seeds P, and says which vector a module uses. PEFT counts them
in the order of torch's model, which no file has; where there are several vectors, the number is
found by drawing P again. So an adapter of several vectors can be written if PEFT has made it, one
of a single vector (``tying=1.0``) always.

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Fields, Read, Slice, Table, want_shape
from jlora.methods.shared_basis.tinylora import TinyLoRA, group_of, groups_of
from jlora.torch_random import Generator
from jlora.types import Dynamic, Json

V, P = "tinylora_v", "tinylora_P"
TINY = ("tinylora_A", "tinylora_B")
SAME = 1e-5  # a drawn number is the file's, in spite of torch's last bits
ORDER = "PEFT counts modules in the order of torch's model, which files do not say"


def _write_tiny(method: TinyLoRA, site: Site, p: Arrays) -> Slice | None:
    if not p["p"].any():
        return None
    table = "gather" in site.ops
    drawn = p["p"] if table else p["p"].mT
    fields: dict[str, Dynamic] = {
        "projection_seed": method.seed,
        "r": method.rank,
        "u": method.size,
        "weight_tying": method.tying,
    }
    fields |= {"group": int(p["group"]), "groups": len(p["v"]), P: drawn}  # for `_settle_tiny`
    sides = (p["b"], p["a"]) if table else (p["a"].T, p["b"].T)
    return Slice(dict(zip((*TINY, P), (*sides, drawn), strict=True)), fields)


def _settle_tiny(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """Whether PEFT will give every module its own vector."""
    known: Dynamic = modules
    first = next(iter(known.values()))
    groups = groups_of(len(known), first["weight_tying"])
    if first["groups"] != groups:
        raise ValueError(
            f"{first['groups']} vectors, PEFT makes {groups} of weight_tying = "
            f"{first['weight_tying']} for {len(known)} modules"
        )
    if groups > 1:
        numbers = _numbers({m: f[P] for m, f in known.items()}, first["projection_seed"])
        for module, fields in sorted(known.items()):
            want = group_of(numbers[module], len(known), groups)
            if fields["group"] != want:
                raise ValueError(f"{module}: vector {fields['group']}, PEFT takes {want}; {ORDER}")
    gone = ("group", "groups", P)
    return {m: {k: v for k, v in f.items() if k not in gone} for m, f in known.items()}, {}


def _read_tiny(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    table = "gather" in site.ops
    rank, size = min(fields["r"], site.d_in, site.d_out), fields["u"]
    method = TinyLoRA(fields["r"], size, fields["weight_tying"], fields["projection_seed"])
    sides = (site.d_out, site.d_in) if table else (site.d_in, site.d_out)
    want_shape(TINY[0], t[TINY[0]], (rank, sides[0]))
    want_shape(TINY[1], t[TINY[1]], (sides[1], rank))
    want_shape(P, t[P], (size, rank, rank))
    want_shape(f"{V}.0", t[f"{V}.0"], (size,))
    own = (t[TINY[1]], t[TINY[0]], t[P]) if table else (t[TINY[0]].T, t[TINY[1]].T, t[P].mT)
    return Read(method, {}, {**dict(zip("abp", own, strict=True)), "group": t["group"]})


def _relate_tiny(
    config: Mapping[str, Json], modules: Mapping[str, tuple[Site, Arrays]], shared: Arrays
) -> Mapping[str, Arrays]:
    """The vector of every module, and P where it is drawn from a seed."""
    count, tying = len(modules), config.get("weight_tying", 0.0)
    seed = config.get("projection_seed", 42)
    groups, size = groups_of(count, tying), _read_vectors(shared)["v"].shape[-1]
    if len(shared) != groups:
        raise ValueError(f"{sorted(shared)}, expected {groups} of weight_tying = {tying}")
    lacking = sorted(module for module, (_, t) in modules.items() if P not in t)
    if lacking and count > 1:
        raise ValueError(f"{lacking[0]}: no {P}, and its seed goes by numbers: {ORDER}")
    drawn = {
        m: t[P] if P in t else _draw(seed, size, min(config.get("r", 2), site.d_in, site.d_out))
        for m, (site, t) in modules.items()
    }
    numbers = dict.fromkeys(modules, 0) if groups == 1 else _numbers(drawn, seed)
    return {
        m: {P: p, "group": np.asarray(group_of(numbers[m], count, groups), np.int32)}
        for m, p in drawn.items()
    }


def _numbers(drawn: Mapping[str, np.ndarray], seed: int) -> dict[str, int]:
    """Module -> its number, of its random matrices."""
    numbers: dict[str, int] = {}
    for module, p in sorted(drawn.items()):
        if p.ndim != 3 or p.shape[1] != p.shape[2]:
            raise ValueError(f"{module}: {P} has shape {list(p.shape)}, expected square matrices")
        for number in set(range(len(drawn))) - set(numbers.values()):
            if np.allclose(_draw(seed + number, len(p), p.shape[-1]), p, rtol=0, atol=SAME):
                numbers[module] = number
                break
        else:
            raise ValueError(f"{module}: {P} is none of the seed {seed}, so that its vector is not "
                             f"known: {ORDER}; expected tying=1.0")  # fmt: skip
    return numbers


def _draw(seed: int, size: int, rank: int) -> np.ndarray:
    return Generator(seed).normal((size, rank, rank), 1.0 / rank**0.5)


def _read_vectors(shared: Arrays) -> Arrays:
    wanted = [f"{V}.{k}" for k in range(len(shared))]
    shapes = {t.shape for t in shared.values()}
    if set(shared) != set(wanted) or len(shapes) != 1 or len(shapes.copy().pop()) != 1:
        raise ValueError(f"{sorted(shared)} of shapes {sorted(shapes)}, expected {wanted} of [k]")
    return {"v": np.stack([shared[key] for key in wanted])}


TINYLORA = Table(
    type="TINYLORA",
    method=TinyLoRA,
    layouts=((*TINY, P), TINY),
    fields={"projection_seed": 42, "r": 2, "u": 64, "weight_tying": 0.0},
    write=_write_tiny,
    read=_read_tiny,
    free={
        "bias": "none",
        "fan_in_fan_out": False,
        "init_v_bound": 0.02,
        "init_weights": True,
        "save_projection": True,
        "tinylora_dropout": 0.0,
    },
    lacks=("exclude_modules",),
    sparse=True,
    families=(V,),
    relate=_relate_tiny,
    settle=_settle_tiny,
    trains_shared=True,
    write_shared=lambda shared: {f"{V}.{k}": row for k, row in enumerate(shared["v"])},
    read_shared=_read_vectors,
)
