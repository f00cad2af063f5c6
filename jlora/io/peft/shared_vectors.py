"""PEFT tables of the methods whose trained vectors all modules share: VB-LoRA and Uni-LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Read, Slice, Table, want_shape
from jlora.methods.shared_basis.unilora import UniLoRA
from jlora.methods.shared_basis.vblora import VBLoRA
from jlora.types import Json

# --- VB-LoRA: factors of pieces, each a mix of the bank's vectors --------------------------------

BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
TOP = tuple(f"{name}_topk_{part}" for name in LOGITS for part in ("indices", "weights"))


def _write_vblora(method: VBLoRA, site: Site, p: Arrays) -> Slice:
    logits = p["logits_a"]
    fields = {
        "num_vectors": logits.shape[-1],
        "r": logits.shape[0],
        "topk": method.top_k,
        "vector_length": site.d_in // logits.shape[1],
    }
    return Slice(dict(zip(LOGITS, (logits, p["logits_b"]), strict=True)), fields)


def _read_vblora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, count, length = fields["r"], fields["num_vectors"], fields["vector_length"]
    method = VBLoRA(rank, count, length, fields["topk"])
    want_shape(BANK, t[BANK], (count, length))
    if site.d_in % length or site.d_out % length:
        raise ValueError(f"vector_length = {length} does not divide {site.d_in} and {site.d_out}")
    pieces = (rank, site.d_in // length), (site.d_out // length, rank)
    logits = []
    for key, shape in zip(LOGITS, pieces, strict=True):
        if f"{key}_topk_indices" in t:
            weights = _of_best(key, t, method, shape)
        else:
            weights = t[key]
            want_shape(key, weights, (*shape, count))
        logits.append(weights)
    return Read(method, {"logits_a": logits[0], "logits_b": logits[1]}, {})


def _of_best(key: str, t: Arrays, method: VBLoRA, shape: tuple[int, ...]) -> np.ndarray:
    """Logits of a file with ``save_only_topk_weights``; those that were not chosen are -inf."""
    ids, weights = (t[f"{key}_topk_{part}"] for part in ("indices", "weights"))
    want_shape(f"{key}_topk_indices", ids, (*shape, method.top_k))
    want_shape(f"{key}_topk_weights", weights, (*shape, method.top_k - 1))
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= method.num_vectors:
        raise ValueError(f"{key}_topk_indices: expected integers in 0..{method.num_vectors - 1}")
    last = 1 - weights.sum(-1, keepdims=True, dtype=weights.dtype)  # it is left out of the file
    with np.errstate(divide="ignore", invalid="ignore"):
        best = np.log(np.concatenate([weights, last], axis=-1)).astype(weights.dtype)
    if np.isnan(best).any():
        raise ValueError(f"{key}_topk_weights: expected weights that sum to at most 1")
    logits = np.full((*shape, method.num_vectors), -np.inf, weights.dtype)
    np.put_along_axis(logits, ids.astype(np.int64), best, axis=-1)
    return logits


# --- Uni-LoRA: every entry of every factor is one of a vector's, times a scale -------------------

THETA = "unilora_theta_d"
INDICES = ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")


def _write_unilora(method: UniLoRA, site: Site, p: Arrays) -> Slice:
    tensors = {
        key: p[f"index_{k}"].T.astype(np.int64) for key, k in zip(INDICES, "ab", strict=True)
    }
    tensors |= {key: p[f"scale_{k}"].T for key, k in zip(SCALES, "ab", strict=True)}
    return Slice(tensors, {"r": method.rank, "theta_d_length": method.size})


def _read_unilora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, size = fields["r"], fields["theta_d_length"]
    method = UniLoRA(rank, size)
    want_shape(THETA, t[THETA], (size,))
    frozen = {}
    for k, shape in (("A", (rank, site.d_in)), ("B", (site.d_out, rank))):
        index, scale = t[f"unilora_indices_{k}"], t[f"unilora_scales_{k}"]
        want_shape(f"unilora_indices_{k}", index, shape)
        want_shape(f"unilora_scales_{k}", scale, shape)
        if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= size:
            raise ValueError(f"unilora_indices_{k}: expected integers in 0..{size - 1}")
        frozen[f"index_{k.lower()}"] = index.T.astype(np.int32)
        frozen[f"scale_{k.lower()}"] = scale.T
    return Read(method, {}, frozen)


VBLORA = Table(
    type="VBLORA",
    method=VBLoRA,
    layouts=(LOGITS, TOP),
    fields={"num_vectors": 256, "r": 4, "topk": 2, "vector_length": 256},
    write=_write_vblora,
    read=_read_vblora,
    free={
        "bias": "none",
        "fan_in_fan_out": False,
        "init_logits_std": 0.1,
        "init_vector_bank_bound": 0.02,
        "save_only_topk_weights": False,
        "vblora_dropout": 0.0,
    },
    shared=(BANK,),
    trains_shared=True,
    write_shared=lambda shared: {BANK: shared["bank"]},
    read_shared=lambda t: {"bank": t[BANK]},
)

UNILORA = Table(
    type="UNILORA",
    method=UniLoRA,
    layouts=((*INDICES, *SCALES),),
    fields={"r": 4, "theta_d_length": 256},
    write=_write_unilora,
    read=_read_unilora,
    fixed={"save_indices": True},
    allowed={"save_indices": (True,)},  # else PEFT draws them in the order of torch's modules
    lacks=("exclude_modules",),
    free={
        "bias": "none",
        "fan_in_fan_out": False,
        "init_theta_d_bound": 0.02,
        "init_weights": True,
        "proj_seed": 42,
        "unilora_dropout": 0.0,
    },
    shared=(THETA,),
    trains_shared=True,
    write_shared=lambda shared: {THETA: shared["theta"]},
    read_shared=lambda t: {"theta": t[THETA]},
)
