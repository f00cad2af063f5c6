"""PEFT tables of LoRAs with a start that is subtracted from the base: PiSSA and OLoRA.

Source: peft 0.21.2, its files and its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jlora.core.site import Site
from jlora.inits.olora import orthonormal
from jlora.io.peft.lora import ALLOWED, FIXED, FREE, LORA, MATRIX, PATTERNS
from jlora.io.peft.table import Arrays, Read, Slice, Table
from jlora.methods.low_rank.pissa import principal
from jlora.methods.wrappers.residual import Residual
from jlora.types import Dynamic, Json


def _read_started(site: Site, t: Arrays, fields: Mapping[str, Json], start: Dynamic) -> Read:
    """LoRA minus the start that PEFT subtracts from the base whenever it makes such an adapter."""
    read = LORA.read(site, {key: t[key] for key in MATRIX}, fields)
    w, scale = jnp.asarray(t["base"], site.param_dtype), float(read.frozen["scale"])
    a0, b0 = start(w, fields["r"], scale)
    frozen = {**read.frozen, "a0": np.asarray(a0), "b0": np.asarray(b0)}
    return Read(Residual(read.method), read.trainable, frozen)


def _read_pissa(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    def start(w: Dynamic, rank: int, scale: float) -> Dynamic:
        return principal(None, w, rank, scale, None)  # type: ignore[arg-type]

    return _read_started(site, t, fields, start)


def _read_olora(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    return _read_started(site, t, fields, lambda w, rank, scale: orthonormal(w, rank))


def _write_started(method: Residual, site: Site, p: Arrays) -> Slice:
    raise ValueError("a start of its own cannot be said in PEFT's files: write jl.inits.fold(it)")


PISSA = Table(
    type="LORA",
    method=Residual,
    layouts=(MATRIX,),
    fields=LORA.fields,
    write=_write_started,
    read=_read_pissa,
    patterns=PATTERNS,
    fixed=FIXED,
    choose={"init_lora_weights": "pissa", "use_dora": False},
    free={k: v for k, v in FREE.items() if k != "init_lora_weights"},
    allowed={"bias": ALLOWED["bias"]},
    sparse=True,
    weighs=True,
    writes=False,
)


OLORA = dataclasses.replace(
    PISSA, read=_read_olora, choose={"init_lora_weights": "olora", "use_dora": False}
)
