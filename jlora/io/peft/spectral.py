"""PEFT tables of methods that train a weight in directions of its own: OSF, FRoD.

=========  ==================================================  ====================================
type       PEFT's tensors                                      ours
=========  ==================================================  ====================================
OSF        osf_svd_params: U_low [out, r], S_low [r],          v transposed, s,
           V_low [r, in]                                       u transposed
FROD       frod_lambda_l [in], frod_lambda_s_values [n]        lam, c
           of a role: frod_V [in, in], frod_s_indices [2, n]   v; cols and rows
=========  ==================================================  ====================================

Both are relative to the weight: OSF replaces its small directions, and the U of FRoD is found from
it and V. FRoD is read but not written: PEFT finds U from a V that it decomposes again when it loads
a file, and multiplies it with the V of the file. Another machine may choose other signs of
eigenvectors (and where eigenvalues are equal, as all of a role with one layer, other vectors), and
the model is then another.

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: FRoD adds the change to the weight, PEFT leaves the weight out; they differ by rounding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Fields, Read, Slice, Table, want_shape
from jlora.methods.low_rank.osf import OSF, halves
from jlora.methods.shared_basis.frod import FRoD, coordinates
from jlora.types import Dynamic, Json

# --- OSF ----------------------------------------------------------------------------------------

LOW = tuple(f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))
APART = 1e-5  # singular values that are closer, relative to the largest, are equal


def _write_osf(method: OSF, site: Site, p: Arrays) -> Slice | None:
    if not p["high_in"].any():
        return None
    kept = min(site.d_in, site.d_out) - p["s"].size
    tensors = dict(zip(LOW, (p["v"].T, p["s"], p["u"].T), strict=True))
    return Slice(tensors, {"effective_rank": kept})


def _settle_osf(modules: Mapping[str, Fields]) -> tuple[Mapping[str, Fields], Fields]:
    """The usual number, and the others by patterns that PEFT searches anywhere in a name."""
    kept: dict[str, Dynamic] = {m: fields["effective_rank"] for m, fields in modules.items()}
    usual = Counter(kept.values()).most_common(1)[0][0]
    others = {f"^{re.escape(m)}$": k for m, k in sorted(kept.items()) if k != usual}
    common: Fields = {"effective_rank": usual, "rank_pattern": others or None}
    return {m: {} for m in modules}, common


def _read_osf(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    size, low = min(site.d_in, site.d_out), t[LOW[1]].size
    kept = size - low
    if not 0 < kept < size:
        raise ValueError(f"{LOW[1]} has {low} of {size} directions, expected 1 to {size - 1}")
    want_shape(LOW[0], t[LOW[0]], (site.d_out, low))
    want_shape(LOW[1], t[LOW[1]], (low,))
    want_shape(LOW[2], t[LOW[2]], (low, site.d_in))
    values = np.linalg.svd(t["base"].astype(np.float64), compute_uv=False)
    if values[kept - 1] - values[kept] <= APART * values[0]:
        raise ValueError(
            f"singular values {kept} and {kept + 1} of the weight are equal, so that what PEFT "
            "keeps is its choice and not in the file"
        )
    frozen = halves(jnp.asarray(t["base"], site.param_dtype), kept)
    trainable = {"u": t[LOW[2]].T, "s": t[LOW[1]], "v": t[LOW[0]].T}
    return Read(OSF(kept), trainable, {name: np.asarray(part) for name, part in frozen.items()})


# --- FRoD ---------------------------------------------------------------------------------------

OWN = ("frod_lambda_l", "frod_lambda_s_values")
ROLE = ("frod_V", "frod_s_indices", "frod_s_size")


def role(module: str) -> str:
    """The role of a module, by which PEFT shares tensors among the layers.

    Args:
      module: its dotted name.

    Returns:
      Its last name, after the one before that if it is no number.
    """
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"  # the one role whose name has a part before the last two
    return "_".join(parts[-2:])


def _relate_frod(
    config: Mapping[str, Json], modules: Mapping[str, tuple[Site, Arrays]], shared: Arrays
) -> Mapping[str, Arrays]:
    """The tensors of the role of every module."""
    related = {}
    for module in modules:
        keys = {name: f"{name}.{role(module)}" for name in ROLE}
        lacking = sorted(set(keys.values()) - shared.keys())
        if lacking:
            raise ValueError(f"{module}: the file lacks {lacking}")
        related[module] = {name: shared[key] for name, key in keys.items()}
    return related


def _read_frod(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    v, indices, sizes = (t[name] for name in ROLE)
    values = t[OWN[1]]
    want_shape(OWN[0], t[OWN[0]], (site.d_in,))
    want_shape(OWN[1], values, (values.size,))
    want_shape(ROLE[0], v, (site.d_in, site.d_in))
    want_shape(ROLE[1], indices, (2, values.size))
    good = indices.dtype.kind in "iu" and ((indices >= 0) & (indices < site.d_in)).all()
    if not good or sizes.tolist() != [site.d_in, site.d_in]:
        raise ValueError(f"{ROLE[1]}: expected integers in 0..{site.d_in - 1} of {ROLE[2]} "
                         f"{[site.d_in] * 2}, got {sizes.tolist()}")  # fmt: skip
    lam0, u = coordinates(v, t["base"])
    cols, rows = indices.astype(np.int32)
    frozen = {"v": v, "u": u, "lam0": lam0, "rows": rows, "cols": cols}
    method = FRoD(fields["sparse_rate"], fields["projection_prng_key"])
    return Read(method, {"lam": t[OWN[0]], "c": values}, frozen)


def _no_frod(*_: Dynamic) -> Dynamic:
    raise ValueError("PEFT finds U of FRoD from a V of its own, so that no file says what it is")


OSF_TABLE = Table(
    type="OSF",
    method=OSF,
    layouts=(LOW,),
    fields={},
    write=_write_osf,
    read=_read_osf,
    free={
        "effective_rank": None,  # the tensors say it
        "init_weights": True,
        "rank_pattern": None,
        "target_svd_config": None,
    },
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform"),
    settle=_settle_osf,
    sparse=True,
    weighs=True,
)

FROD = Table(
    type="FROD",
    method=FRoD,
    layouts=(OWN,),
    fields={"projection_prng_key": 0, "sparse_rate": 0.01},
    write=_no_frod,
    read=_read_frod,
    writes=False,
    free={
        "bias": "none",
        "fan_in_fan_out": False,
        "frod_dropout": 0.0,
        "init_weights": True,
        "progressbar": True,
        "regularization_alpha": 1e-3,
        "runtime_offload_base_weight": False,
        "save_projection": True,
    },
    lacks=("exclude_modules",),
    sparse=True,
    families=ROLE,
    relate=_relate_frod,
    weighs=True,
    read_shared=lambda shared: {},
)
