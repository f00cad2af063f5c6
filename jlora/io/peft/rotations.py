"""PEFT tables of methods that turn inputs or outputs, or bound a delta: HRA, RoAd, DeLoRA.

=========  ==================================================  ====================================
type       PEFT's tensors                                      ours
=========  ==================================================  ====================================
HRA        hra_u [in, r]                                       u
ROAD       road_theta, road_alpha [v out / 2]                  theta, alpha
DELORA     delora_A [r, in], delora_B [out, r]                 a, b
           delora_lambda [1], delora_w_norm [in]               strength [], norm
=========  ==================================================  ====================================

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: HRA files with `apply_GS` whose columns are dependent are refused: what PEFT computes of
them is the rounding error of 0 / 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Read, Slice, Table, trim, want_shape
from jlora.methods.decomposed.delora import DeLoRA
from jlora.methods.orthogonal.hra import HRA
from jlora.methods.orthogonal.road import RoAd
from jlora.types import Json

INDEPENDENT = 1e-4  # the least of the singular values of unit columns


def _write_hra(method: HRA, site: Site, p: Arrays) -> Slice | None:
    rank, p = trim(p, method.rank_axes)
    if rank == 0:
        return None
    _check_columns(p["u"], method.gram_schmidt)
    return Slice({"hra_u": p["u"]}, {"r": rank, "apply_GS": method.gram_schmidt})


def _read_hra(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    u, rank, gs = t["hra_u"], fields["r"], fields["apply_GS"]
    want_shape("hra_u", u, (site.d_in, rank))
    _check_columns(u, gs)
    return Read(HRA(rank, gs), {"u": u}, {})


def _check_columns(u: np.ndarray, gram_schmidt: bool) -> None:
    """Raises ValueError for columns that PEFT divides by zero or by rounding errors."""
    length = np.linalg.norm(u.astype(np.float64), axis=0)
    if not length.all():
        raise ValueError("hra_u has a column of zeros, by whose length PEFT divides")
    if gram_schmidt:
        least = (
            np.linalg.svd(u / length, compute_uv=False).min() if u.shape[0] >= len(length) else 0
        )
        if least < INDEPENDENT:
            raise ValueError(
                "hra_u has dependent columns, which Gram-Schmidt (apply_GS) cannot make orthogonal"
            )


def _write_road(method: RoAd, site: Site, p: Arrays) -> Slice:
    fields = {"group_size": method.group, "variant": f"road_{method.variant}"}
    return Slice({"road_theta": p["theta"], "road_alpha": p["alpha"]}, fields)


def _read_road(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    variant, group = int(fields["variant"].removeprefix("road_")), fields["group_size"]
    if group < 2 or group % 2 or site.d_out % group:
        raise ValueError(f"group_size = {group}, expected an even divisor of {site.d_out} outputs")
    for key in ("road_theta", "road_alpha"):
        want_shape(key, t[key], (variant * site.d_out // 2,))
    return Read(RoAd(variant, group), {"theta": t["road_theta"], "alpha": t["road_alpha"]}, {})


def _write_delora(method: DeLoRA, site: Site, p: Arrays) -> Slice | None:
    live, p = trim(p, method.rank_axes)
    if live == 0:
        return None
    rank = round(1 / float(p["scale"]))  # by which PEFT divides, whichever directions are zero
    if rank < live or np.float32(1 / rank) != np.float32(p["scale"]):
        raise ValueError(f"scale = {float(p['scale'])!r}, expected 1 / rank of {live} or more")
    a = np.pad(p["a"], ((0, 0), (0, rank - live)))
    b = np.pad(p["b"], ((0, rank - live), (0, 0)))
    tensors = {
        "delora_A": a.T,
        "delora_B": b.T,
        "delora_lambda": p["strength"][None],
        "delora_w_norm": p["norm"],
    }
    return Slice(tensors, {"r": rank})


def _read_delora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank = fields["r"]
    want_shape("delora_A", t["delora_A"], (rank, site.d_in))
    want_shape("delora_B", t["delora_B"], (site.d_out, rank))
    want_shape("delora_lambda", t["delora_lambda"], (1,))
    want_shape("delora_w_norm", t["delora_w_norm"], (site.d_in,))
    trainable = {"a": t["delora_A"].T, "b": t["delora_B"].T, "strength": t["delora_lambda"][0]}
    frozen = {"norm": t["delora_w_norm"], "scale": np.asarray(1 / rank, np.float32)}
    return Read(DeLoRA(rank), trainable, frozen)


HRA_TABLE = Table(
    type="HRA",
    method=HRA,
    layouts=(("hra_u",),),
    fields={"r": 8, "apply_GS": False},
    write=_write_hra,
    read=_read_hra,
    free={"bias": "none", "init_weights": True},
    sparse=True,
)

ROAD = Table(
    type="ROAD",
    method=RoAd,
    layouts=(("road_theta", "road_alpha"),),
    fields={"group_size": 64, "variant": "road_1"},
    write=_write_road,
    read=_read_road,
    allowed={"variant": ("road_1", "road_2", "road_4")},
    free={"init_weights": True},
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform"),
    biased=lambda method: True,
)

DELORA = Table(
    type="DELORA",
    method=DeLoRA,
    layouts=(("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),),
    fields={"r": 8},
    write=_write_delora,
    read=_read_delora,
    patterns={"r": "rank_pattern"},
    free={
        "bias": "none",
        "delora_lambda": 15,
        "init_weights": True,
        "lambda_pattern": {},
        "module_dropout": 0.0,
    },
)
