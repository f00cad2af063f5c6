"""PEFT tables of methods that are led by the weight: PEANuT, DEFT, GLoRA.

=========  ==================================================  ====================================
type       PEFT's tensors                                      ours
=========  ==================================================  ====================================
PEANUT     peanut_A [r, out], peanut_B [out, r]                a, b, transposed
           peanut_encoders.k, peanut_decoders.k [r, r]         enc, dec [depth, r, r], transposed
DEFT       deft_P [out, r], deft_R [r, in]                     p, and r, transposed
GLORA      glora_A, glora_B: Xd [out, r], Xu [r, in]           a_out, a_in, b_out, b_in, transposed
           X [out, 1] or [1]                                   a, b [out] or []
           glora_C, _D, _E.zeros, of a module without a bias   none
=========  ==================================================  ====================================

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Read, Slice, Table, alpha_of, want_shape
from jlora.methods.weight_led.deft import DEFT
from jlora.methods.weight_led.glora import FORMS, GLoRA
from jlora.methods.weight_led.peanut import ACTIVATIONS, PEANuT
from jlora.types import Dynamic, Json

# --- PEANuT -------------------------------------------------------------------------------------

ENDS = ("peanut_A.weight", "peanut_B.weight")
DEEPEST = 16


def _layers(depth: int) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"peanut_encoders.{k}.weight", f"peanut_decoders.{k}.weight") for k in range(depth)
    )


def _write_peanut(method: PEANuT, site: Site, p: Arrays) -> Slice:
    tensors = {ENDS[0]: p["a"].T, ENDS[1]: p["b"].T}
    for k, (encoder, decoder) in enumerate(_layers(method.depth)):
        tensors |= {encoder: p["enc"][k].T, decoder: p["dec"][k].T}
    fields = {
        "act_fn": method.activation,
        "depth": method.depth,
        "r": method.rank,
        "scaling": method.scaling,
    }
    return Slice(tensors, fields)


def _read_peanut(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, depth = fields["r"], fields["depth"]
    layers = _layers(depth)
    if set(t) != {*ENDS, *(key for pair in layers for key in pair)}:
        raise ValueError(f"got {sorted(t)} with depth = {depth}")
    want_shape(ENDS[0], t[ENDS[0]], (rank, site.d_out))
    want_shape(ENDS[1], t[ENDS[1]], (site.d_out, rank))
    p = {"a": t[ENDS[0]].T, "b": t[ENDS[1]].T}
    for pair in layers:
        for key in pair:
            want_shape(key, t[key], (rank, rank))
    if depth:
        p["enc"], p["dec"] = (np.stack([t[pair[k]].T for pair in layers]) for k in (0, 1))
    return Read(PEANuT(rank, depth, fields["act_fn"], fields["scaling"]), p, {})


# --- DEFT ---------------------------------------------------------------------------------------


def _write_deft(method: DEFT, site: Site, p: Arrays) -> Slice:
    tensors = {"deft_P": p["p"]} if method.remove else {"deft_P": p["p"], "deft_R": p["r"].T}
    alpha: Dynamic = None
    if method.alpha is not None:
        alpha = alpha_of(method, p["scale"], method.rank)
    elif p["scale"] != 1:
        raise ValueError(f"scale = {float(p['scale'])!r}, expected 1 without an alpha")
    fields = {
        "alpha": alpha,
        "decomposition_method": method.projection,
        "para": method.remove,
        "r": method.rank,
    }
    return Slice(tensors, fields)


def _read_deft(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, alpha, remove = min(fields["r"], site.d_out), fields["alpha"] or None, fields["para"]
    if rank < 1 or isinstance(alpha, str | bool):
        raise ValueError(f"r = {rank}, alpha = {alpha!r}, expected numbers")
    if remove == ("deft_R" in t):
        raise ValueError(f"got {sorted(t)} with para = {remove}")
    want_shape("deft_P", t["deft_P"], (site.d_out, rank))
    trainable = {"p": t["deft_P"]}
    if not remove:
        want_shape("deft_R", t["deft_R"], (rank, site.d_in))
        trainable["r"] = t["deft_R"].T
    scale = np.asarray(1.0 if alpha is None else alpha / rank, np.float32)
    method = DEFT(rank, alpha, fields["decomposition_method"], remove)
    return Read(method, trainable, {"scale": scale})


# --- GLoRA --------------------------------------------------------------------------------------

BIAS = {"glora_C.zeros": "in", "glora_D.zeros": "out", "glora_E.zeros": "out"}


def _write_glora(method: GLoRA, site: Site, p: Arrays) -> Slice:
    tensors = {
        "glora_C.zeros": np.zeros((site.d_in, 1), np.float32),
        "glora_D.zeros": np.zeros(site.d_out, np.float32),
        "glora_E.zeros": np.zeros(site.d_out, np.float32),
    }
    for name in "ab":
        key = f"glora_{name.upper()}"
        if method.form == "lora":
            tensors |= {f"{key}.Xd": p[f"{name}_out"].T, f"{key}.Xu": p[f"{name}_in"].T}
        else:
            shape = (site.d_out, 1) if method.form == "vector" else (1,)
            tensors[f"{key}.X"] = p[name].reshape(shape)
    return Slice(tensors, {"config_A_B": method.form, "r": method.rank})


def _read_glora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, form = fields["r"], fields["config_A_B"]
    lora = "glora_A.Xd" in t
    if lora != (form == "lora"):
        raise ValueError(f"got {sorted(t)} with config_A_B = {form!r}")
    for key, side in BIAS.items():
        want_shape(key, t[key], (site.d_in, 1) if side == "in" else (site.d_out,))
        if t[key].any():
            raise ValueError(f"{key} is not zero")
    p: Arrays = {}
    for name in "ab":
        key = f"glora_{name.upper()}"
        if lora:
            want_shape(f"{key}.Xd", t[f"{key}.Xd"], (site.d_out, rank))
            want_shape(f"{key}.Xu", t[f"{key}.Xu"], (rank, site.d_in))
            p |= {f"{name}_in": t[f"{key}.Xu"].T, f"{name}_out": t[f"{key}.Xd"].T}
        else:
            want_shape(f"{key}.X", t[f"{key}.X"], (site.d_out, 1) if form == "vector" else (1,))
            p[name] = t[f"{key}.X"].reshape((site.d_out,) if form == "vector" else ())
    return Read(GLoRA(rank, form), p, {})


PEANUT = Table(
    type="PEANUT",
    method=PEANuT,
    layouts=tuple(
        (*ENDS, *(key for pair in _layers(depth) for key in pair)) for depth in range(DEEPEST + 1)
    ),
    fields={"act_fn": "relu", "depth": 0, "r": 32, "scaling": 1.0},
    write=_write_peanut,
    read=_read_peanut,
    allowed={"act_fn": tuple(ACTIVATIONS)},
    free={"init_weights": True},
)

DEFT_TABLE = Table(
    type="DEFT",
    method=DEFT,
    layouts=(("deft_P", "deft_R"), ("deft_P",)),
    fields={"alpha": None, "decomposition_method": "relu", "para": False, "r": 8},
    write=_write_deft,
    read=_read_deft,
    allowed={"decomposition_method": ("relu", "qr")},
    free={
        "bias": "none",
        "deft_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_scale": 1.0,
        "init_weights": True,
    },
)

GLORA = Table(
    type="GLORA",
    method=GLoRA,
    layouts=(
        ("glora_A.Xd", "glora_A.Xu", "glora_B.Xd", "glora_B.Xu", *BIAS),
        ("glora_A.X", "glora_B.X", *BIAS),
    ),
    fields={"config_A_B": "lora", "r": 8},
    write=_write_glora,
    read=_read_glora,
    allowed={"config_A_B": FORMS},
    free={"bias": "none", "config_C": "lora", "config_D_E": "constant", "init_weights": True},
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform"),
    biased=lambda method: True,
)
