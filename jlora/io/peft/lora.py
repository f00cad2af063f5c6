"""PEFT tables of the LoRA family: LoRA with its embedding tables, DoRA, HiRA, AdaLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jlora.core.site import Site
from jlora.io import torch_layout
from jlora.io.peft.table import (
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
from jlora.methods.decomposed.dora import DoRA
from jlora.methods.low_rank.adalora import TINY, AdaLoRA
from jlora.methods.low_rank.adalora import scale_of as scale_of_adalora
from jlora.methods.low_rank.hira import HiRA
from jlora.methods.low_rank.kasa import KaSA, smallest
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic, Json

MATRIX = ("lora_A.weight", "lora_B.weight")
TABLE = ("lora_embedding_A", "lora_embedding_B")  # an embedding table [rows, d_out]
MAGNITUDE = "lora_magnitude_vector"
DIAGONAL = "lora_diag"
FREE = {
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
FIXED = {
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "target_parameters": None,  # but see peft_parameters
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# The other initialisations change the base weights: the file alone is not the function. PEFT makes
# those of `pissa` and `olora` again from the base when it loads the file, and so do we.
REASONS = {
    "init_lora_weights": "the base that this adapter was trained on is not in the file: 'corda' "
    "and 'lora_ga' subtracted factors of data from it, 'pissa_niter_N' random ones, 'loftq' "
    "quantised it; save the adapter with path_initial_model_for_weight_conversion in PEFT"
}
ALLOWED = {
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "bias": ("none", "all", "lora_only"),
}
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def _factors(keys: tuple[str, str], site: Site, t: Arrays, rank: int) -> Arrays:
    """a [d_in, r] and b [r, d_out] of PEFT's two factors."""
    t = torch_layout.pointwise(site, t, keys)
    first, second = (t[key] for key in keys)
    want_shape(keys[0], first, torch_layout.first_shape(site, rank))
    want_shape(keys[1], second, torch_layout.second_shape(site, rank))
    return {"a": torch_layout.of_first(site, first), "b": torch_layout.of_second(site, second)}


def _torch_factors(site: Site, p: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_factors`."""
    return torch_layout.first(site, p["a"]), torch_layout.second(site, p["b"])


def _keys(site: Site) -> tuple[str, str]:
    return TABLE if "gather" in site.ops else MATRIX


def _expect(site: Site, t: Arrays, keys: tuple[str, ...]) -> None:
    if set(keys) != set(t):
        raise ValueError(f"got {sorted(t)}, expected {list(keys)} for ops {site.ops}")


def _write_lora(method: LoRA, site: Site, p: Arrays) -> Slice | None:
    rank, p = trim(p, method.rank_axes)
    if rank == 0:
        return None
    fields = {
        "r": rank,
        "lora_alpha": alpha_of(method, p["scale"], rank, method.rslora),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
    }
    return Slice(dict(zip(_keys(site), _torch_factors(site, p), strict=True)), fields)


def _read_lora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    keys = _keys(site)
    _expect(site, t, keys)
    rank, alpha, rslora = fields["r"], fields["lora_alpha"], fields["use_rslora"]
    method = LoRA(rank=rank, alpha=alpha, rslora=rslora, dropout=fields["lora_dropout"])
    return Read(method, _factors(keys, site, t, rank), {"scale": scale_of(alpha, rank, rslora)})


def _write_dora(method: DoRA, site: Site, p: Arrays) -> Slice:
    rank, p = trim(p, method.rank_axes)
    if rank == 0:
        raise ValueError("a and b are zero, which PEFT cannot say of DoRA")
    alpha = alpha_of(method, p["scale"], rank, method.rslora)
    a, b = _torch_factors(site, p)
    m = p["m"].reshape(torch_layout.magnitude_shape(site))
    tensors = {**dict(zip(_keys(site), (a, b), strict=True)), MAGNITUDE: m}
    return Slice(tensors, {"r": rank, "lora_alpha": alpha, "use_rslora": method.rslora})


def _read_dora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, alpha, rslora = fields["r"], fields["lora_alpha"], fields["use_rslora"]
    _expect(site, t, (*_keys(site), MAGNITUDE))
    m, shape = t[MAGNITUDE], torch_layout.magnitude_shape(site)
    if site.d_out * math.prod(torch_layout.first_shape(site, 1)[2:]) == m.size and m.shape in (
        (site.d_out,),
        (1, site.d_out, *(1,) * (m.ndim - 2)),
    ):
        m = m.reshape(shape)  # a window of one point is none
    want_shape(MAGNITUDE, m, shape)
    scale = {"scale": scale_of(alpha, rank, rslora)}
    trainable = {**_factors(_keys(site), site, t, rank), "m": m.reshape(-1)}
    return Read(DoRA(rank=rank, alpha=alpha, rslora=rslora), trainable, scale)


def _write_kasa(method: KaSA, site: Site, p: Arrays) -> Slice:
    rank = p["d"].size
    fields = {"r": rank, "lora_alpha": alpha_of(method, p["scale"], rank)}
    return Slice({MATRIX[0]: p["a"].T, MATRIX[1]: p["b"].T, DIAGONAL: p["d"]}, fields)


def _read_kasa(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, alpha = fields["r"], fields["lora_alpha"]
    want_shape(DIAGONAL, t[DIAGONAL], (rank,))
    trainable = {**_factors(MATRIX, site, t, rank), "d": t[DIAGONAL]}
    a0, b0 = smallest(jnp.asarray(t["base"], site.param_dtype), rank)
    frozen = {"a0": np.asarray(a0), "b0": np.asarray(b0), "scale": scale_of(alpha, rank)}
    return Read(KaSA(rank, alpha), trainable, frozen)


def _settle_kasa(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """The weights of its penalties, of training only."""
    return modules, {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}


def _write_hira(method: HiRA, site: Site, p: Arrays) -> Slice | None:
    rank, p = trim(p, method.rank_axes)
    tensors = {"hira_A": p["a"].T, "hira_B": p["b"].T}
    return Slice(tensors, {"r": rank}) if rank else None


def _read_hira(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    factors = _factors(("hira_A", "hira_B"), site, t, fields["r"])
    return Read(HiRA(rank=fields["r"]), factors, {})


def _ada_scale(alpha: float, rank: int) -> np.ndarray:
    """PEFT's alpha / (r + 1e-5), r where alpha is 0 or less, in float32."""
    if rank < 1:
        raise ValueError(f"rank {rank}, expected at least 1")
    return np.asarray(scale_of_adalora(alpha if alpha > 0 else rank, rank))


def _ada_alpha(method: AdaLoRA, scale: np.ndarray, rank: int) -> tuple[float, np.ndarray]:
    """The alpha of a scale, and what the scale is of that alpha's: 1, or next to it.

    A scale that a schedule computed need not be float32(alpha / (r + 1e-5)) of any alpha; the
    difference of a last digit then goes into `e`.
    """
    exact = float(scale) * float(np.float32(rank) + np.float32(TINY))
    if not exact > 0:
        raise ValueError(f"no alpha gives the scale {float(scale)!r} at rank {rank}")
    near = np.float32(exact)
    around = (near, *(np.nextafter(near, side) for side in (np.float32(0), np.float32(np.inf))))
    for alpha in (method.alpha, round(exact, 4), *map(float, around)):
        if alpha > 0 and _ada_scale(alpha, rank) == scale:
            return alpha, np.ones((), np.float32)
    return float(near), scale / _ada_scale(float(near), rank)


def _write_adalora(method: AdaLoRA, site: Site, p: Arrays) -> Slice | None:
    """Directions that are zero in a, b and e were taken out, if the scale is of the full rank."""
    live = p["e"].astype(bool) | p["a"].any(0) | p["b"].any(1)
    if np.isclose(_ada_scale(method.alpha, method.rank), p["scale"], rtol=1e-6):
        rank = method.rank
    elif live.any():  # what follows is padding, in a bank of other ranks
        rank = int(np.flatnonzero(live)[-1]) + 1
    else:
        return None
    alpha, rest = _ada_alpha(method, p["scale"], rank)
    live = live[:rank]
    a, b, e = p["a"][:, :rank], p["b"][:rank], p["e"][:rank]
    e = (e * rest).astype(e.dtype)
    tensors = {"lora_A": a[:, live].T, "lora_B": b[live].T, "lora_E": e[live, None]}
    alpha = int(alpha) if float(alpha).is_integer() else float(alpha)
    return Slice(tensors, {"init_r": rank, "lora_alpha": alpha, "mask": live.tolist()})


def _settle_adalora(
    modules: Mapping[str, Fields],
) -> tuple[Mapping[str, Fields], Fields]:
    """The masks as one field, None where nothing was taken out."""
    masks = {f"{module}.lora_E": fields.get("mask") for module, fields in modules.items()}
    if all(mask is None or all(mask) for mask in masks.values()):
        none = {module: {**fields, "mask": None} for module, fields in modules.items()}
        return none, {"rank_pattern": None}
    return modules, {"rank_pattern": masks}


def _read_adalora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    full, alpha = fields["init_r"], fields["lora_alpha"]
    scale, mask = _ada_scale(alpha, full), fields.get("mask")
    live = np.ones(full, bool) if mask is None else np.asarray(mask)
    if len(live) != full:
        raise ValueError(f"rank_pattern has {len(live)} directions, expected init_r = {full}")
    rank = int(live.sum())
    want_shape("lora_A", t["lora_A"], (rank, site.d_in))
    want_shape("lora_B", t["lora_B"], (site.d_out, rank))
    want_shape("lora_E", t["lora_E"], (rank, 1))
    parts = {"a": t["lora_A"].T, "b": t["lora_B"].T, "e": t["lora_E"][:, 0]}
    trainable = {}
    for name, part in parts.items():  # zeros where a direction was taken out
        axis = AdaLoRA.rank_axes[name]
        whole = np.zeros([full if k == axis % part.ndim else n for k, n in enumerate(part.shape)])
        index: list[Dynamic] = [slice(None)] * part.ndim
        index[axis] = np.flatnonzero(live)
        trainable[name] = whole.astype(part.dtype)
        trainable[name][tuple(index)] = part
    return Read(AdaLoRA(full, alpha), trainable, {"scale": scale})


LORA = Table(
    type="LORA",
    method=LoRA,
    layouts=(MATRIX, TABLE),
    fields={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    write=_write_lora,
    read=_read_lora,
    patterns=PATTERNS,
    fixed=FIXED,
    choose={"use_dora": False},
    free=FREE,
    allowed=ALLOWED,
    reasons=REASONS,
    sparse=True,
    convolves=True,
)

DORA = Table(
    type="LORA",
    method=DoRA,
    layouts=((*MATRIX, MAGNITUDE), (*TABLE, MAGNITUDE)),
    fields={"r": 8, "lora_alpha": 8, "use_rslora": False},
    write=_write_dora,
    read=_read_dora,
    patterns=PATTERNS,
    fixed=FIXED,
    choose={"use_dora": True},
    free={**FREE, "lora_dropout": 0.0},
    allowed=ALLOWED,
    reasons=REASONS,
    convolves=True,
)


KASA = Table(
    type="LORA",
    method=KaSA,
    layouts=((*MATRIX, DIAGONAL),),
    fields={"r": 8, "lora_alpha": 8},
    write=_write_kasa,
    read=_read_kasa,
    patterns=PATTERNS,
    fixed={k: v for k, v in {**FIXED, "use_rslora": False}.items() if k != "kasa_config"},
    choose={"kasa_config": True, "use_dora": False},
    free={**FREE, "lora_dropout": 0.0},
    settle=_settle_kasa,
    allowed=ALLOWED,
    reasons=REASONS,
    weighs=True,
)

HIRA = Table(
    type="HIRA",
    method=HiRA,
    layouts=(("hira_A", "hira_B"),),
    fields={"r": 32},
    write=_write_hira,
    read=_read_hira,
    patterns={"r": "rank_pattern"},
    free={"fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True},
    sparse=True,
)

# Of the schedule only; `total_step` has to be positive for PEFT.
SCHEDULE = {"beta1": 0.85, "beta2": 0.85, "deltaT": 1, "orth_reg_weight": 0.5, "r": 8}
SCHEDULE |= {"target_r": 8, "tfinal": 0, "tinit": 0, "total_step": 1}

ADALORA = Table(
    type="ADALORA",
    method=AdaLoRA,
    layouts=(("lora_A", "lora_B", "lora_E"),),
    fields={"init_r": 12, "lora_alpha": 8},
    write=_write_adalora,
    read=_read_adalora,
    fixed={**FIXED, "alpha_pattern": {}, "use_rslora": False},
    choose={"use_dora": False},
    free={**FREE, **SCHEDULE, "lora_dropout": 0.0, "rank_pattern": None},
    masks=("rank_pattern", "lora_E"),  # of directions that the schedule has taken out
    settle=_settle_adalora,
    allowed=ALLOWED,
    reasons=REASONS,
    sparse=True,
)
