"""PEFT tables of methods whose places or bases are drawn: SHiRA, Super-Tuning, FourierFT, WaveFT.

============  ============================================  ========================================
type          PEFT's tensors                                ours
============  ============================================  ========================================
SHIRA         shira_weight [n], shira_indices [2, n]        c; cols and rows
SUPERTUNING   supertuning_values [n], ..._indices [n]       c; cols * d_in + rows
              supertuning_lora_A [r, in], ..._B [out, r]    a, b
FOURIERFT     fourierft_spectrum [n]                        c; places of the seed
WAVEFT        waveft_spectrum [n]                           c; places of the seed
============  ============================================  ========================================

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.core.site import Site
from jlora.io.peft.table import Arrays, Read, Slice, Table, alpha_of, scale_of, trim, want_shape
from jlora.methods.sparse import fourierft, waveft
from jlora.methods.sparse.fourierft import FourierFT
from jlora.methods.sparse.shira import SHiRA
from jlora.methods.sparse.supertuning import SuperTuning
from jlora.methods.sparse.waveft import WaveFT
from jlora.types import Dynamic, Json


def _places(key: str, rows: np.ndarray, cols: np.ndarray, site: Site) -> Arrays:
    """rows, cols as int32; raises ValueError where they lie outside the matrix or one comes twice.

    PEFT adds up what lies at one place in one type and keeps the last of it in another.
    """
    if rows.dtype != np.int32 or cols.dtype != np.int32:
        raise ValueError(f"{key}: dtype {rows.dtype}, expected int32")
    inside = (rows >= 0) & (rows < site.d_in) & (cols >= 0) & (cols < site.d_out)
    if not inside.all():
        raise ValueError(f"{key}: places outside the matrix of {site.d_out} x {site.d_in}")
    if np.unique(cols.astype(np.int64) * site.d_in + rows).size != rows.size:
        raise ValueError(f"{key}: a place comes twice")
    return {"rows": rows, "cols": cols}


# --- SHiRA --------------------------------------------------------------------------------------


def _write_shira(method: SHiRA, site: Site, p: Arrays) -> Slice:
    rank, left = divmod(p["c"].size, site.d_in + site.d_out)
    if left or not rank:
        raise ValueError(
            f"{p['c'].size} entries, PEFT wants r (in + out), here a multiple of "
            f"{site.d_in + site.d_out}"
        )
    places = _places("rows, cols", p["rows"], p["cols"], site)
    indices = np.stack([places["cols"], places["rows"]])
    return Slice({"shira_weight": p["c"], "shira_indices": indices}, {"r": rank})


def _read_shira(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank = fields["r"]
    count = rank * (site.d_in + site.d_out)
    if count > site.d_in * site.d_out:
        raise ValueError(f"r = {rank} is more entries than the matrix has")
    want_shape("shira_weight", t["shira_weight"], (count,))
    want_shape("shira_indices", t["shira_indices"], (2, count))
    cols, rows = t["shira_indices"]
    frozen = _places("shira_indices", rows, cols, site)
    return Read(SHiRA(rank), {"c": t["shira_weight"]}, frozen)


# --- Super-Tuning -------------------------------------------------------------------------------

SUPER = ("supertuning_indices", "supertuning_values")
SUPRA = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def _write_super(method: SuperTuning, site: Site, p: Arrays) -> Slice:
    size = site.d_in * site.d_out
    if int(size * (1 - method.sparsity)) != p["c"].size:
        raise ValueError(f"{p['c'].size} entries of {size} with a sparsity of {method.sparsity}")
    places = _places("rows, cols", p["rows"], p["cols"], site)
    tensors = {
        "supertuning_indices": places["cols"] * np.int32(site.d_in) + places["rows"],
        "supertuning_values": p["c"],
    }
    fields: dict[str, Json] = {"r": None, "lora_alpha": None, "sparsity": method.sparsity}
    if method.rank:
        rank, p = trim(p, method.rank_axes)
        if not rank:
            raise ValueError("a and b are zero, which PEFT cannot say of Super-Tuning with a rank")
        tensors |= {SUPRA[0]: p["a"].T, SUPRA[1]: p["b"].T}
        fields |= {"r": rank, "lora_alpha": alpha_of(method, p["scale"], rank)}
    return Slice(tensors, {**fields, "select_top": method.largest})


def _read_super(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, alpha, sparsity = fields["r"], fields["lora_alpha"], fields["sparsity"]
    if SUPRA[0] not in t and rank is None:
        alpha = rank = 0
    elif SUPRA[0] not in t or type(rank) is not int or type(alpha) not in (int, float):
        raise ValueError(f"got {sorted(t)} with r = {rank!r} and lora_alpha = {alpha!r}")
    method = SuperTuning(sparsity, rank, alpha, fields["select_top"])
    count = int(site.d_in * site.d_out * (1 - sparsity))
    for key in SUPER:
        want_shape(key, t[key], (count,))
    flat, trainable = t["supertuning_indices"], {"c": t["supertuning_values"]}
    if flat.dtype != np.int32:
        raise ValueError(f"supertuning_indices: dtype {flat.dtype}, expected int32")
    d_in = np.int32(site.d_in)
    frozen = _places("supertuning_indices", flat % d_in, flat // d_in, site)
    if rank:
        want_shape(SUPRA[0], t[SUPRA[0]], (rank, site.d_in))
        want_shape(SUPRA[1], t[SUPRA[1]], (site.d_out, rank))
        trainable |= {"a": t[SUPRA[0]].T, "b": t[SUPRA[1]].T}
        frozen["scale"] = scale_of(alpha, rank)
    return Read(method, trainable, frozen)


# --- FourierFT and WaveFT: the places are those of the seed ---------------------------------------


def _seeded(method: Dynamic, p: Arrays, rows: np.ndarray, cols: np.ndarray) -> dict[str, Json]:
    """The fields of both, where the places are those that PEFT will draw."""
    if not (np.array_equal(p["rows"], rows) and np.array_equal(p["cols"], cols)):
        raise ValueError(
            f"places that are not those of the seed {method.seed}, which is all that PEFT keeps"
        )
    same = np.float32(method.scaling) == p["scale"]
    return {
        "n_frequency": p["c"].size,
        "random_loc_seed": method.seed,
        "scaling": float(method.scaling if same else p["scale"]),
    }


def _count(key: str, c: np.ndarray, site: Site, fields: Mapping[str, Json]) -> int:
    """The number of coefficients, which `proportional_parameters` leaves to the file."""
    count = c.size if fields.get("proportional_parameters") else fields["n_frequency"]
    want_shape(key, c, (count,))
    if not 1 <= count <= site.d_in * site.d_out:
        raise ValueError(f"n_frequency = {count}, expected 1 to {site.d_in * site.d_out}")
    if fields["random_loc_seed"] < 0:
        raise ValueError(f"random_loc_seed = {fields['random_loc_seed']}, expected 0 or more")
    return count


def _write_fourier(method: FourierFT, site: Site, p: Arrays) -> Slice:
    drawn = fourierft.places(site.d_in, site.d_out, p["c"].size, method.seed)
    return Slice({"fourierft_spectrum": p["c"]}, _seeded(method, p, *drawn))


def _read_fourier(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    c, seed, scaling = t["fourierft_spectrum"], fields["random_loc_seed"], fields["scaling"]
    count = _count("fourierft_spectrum", c, site, fields)
    rows, cols = fourierft.places(site.d_in, site.d_out, count, seed)
    frozen = {"rows": rows, "cols": cols, "scale": np.asarray(scaling, np.float32)}
    return Read(FourierFT(count, scaling, seed), {"c": c}, frozen)


def _write_wave(method: WaveFT, site: Site, p: Arrays) -> Slice:
    given = (site.d_in, site.d_out, p["c"].size, method.seed, method.wavelet)
    fields = _seeded(method, p, *waveft.places(*given))
    return Slice(
        {"waveft_spectrum": p["c"]},
        {**fields, "proportional_parameters": False, "use_idwt": method.wavelet},
    )


def _read_wave(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    c, seed, scaling = t["waveft_spectrum"], fields["random_loc_seed"], fields["scaling"]
    count, wavelet = _count("waveft_spectrum", c, site, fields), fields["use_idwt"]
    rows, cols = waveft.places(site.d_in, site.d_out, count, seed, wavelet)
    frozen = {"rows": rows, "cols": cols, "scale": np.asarray(scaling, np.float32)}
    return Read(WaveFT(count, scaling, seed, wavelet), {"c": c}, frozen)


SHIRA = Table(
    type="SHIRA",
    method=SHiRA,
    layouts=(("shira_weight", "shira_indices"),),
    fields={"r": 32},
    write=_write_shira,
    read=_read_shira,
    free={
        "fan_in_fan_out": False,
        "init_weights": True,
        "mask_type": "random",
        "random_seed": None,
    },
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform"),
)

SUPERTUNING = Table(
    type="SUPERTUNING",
    method=SuperTuning,
    layouts=(SUPER, (*SUPER, *SUPRA)),
    fields={"r": None, "lora_alpha": None, "select_top": True, "sparsity": 0.99},
    write=_write_super,
    read=_read_super,
    free={"init_weights": True, "lora_dropout": 0.0, "save_precomputed_indices": True},
    lacks=("exclude_modules", "layers_pattern", "layers_to_transform"),
)

FOURIERFT = Table(
    type="FOURIERFT",
    method=FourierFT,
    layouts=(("fourierft_spectrum",),),
    fields={"n_frequency": 1000, "random_loc_seed": 777, "scaling": 150.0},
    write=_write_fourier,
    read=_read_fourier,
    patterns={"n_frequency": "n_frequency_pattern"},
    free={"bias": "none", "fan_in_fan_out": False, "init_weights": False},
)

WAVEFT = Table(
    type="WAVEFT",
    method=WaveFT,
    layouts=(("waveft_spectrum",),),
    fields={
        "n_frequency": 2592,
        "proportional_parameters": False,
        "random_loc_seed": 777,
        "scaling": 25.0,
        "use_idwt": True,
    },
    write=_write_wave,
    read=_read_wave,
    patterns={"n_frequency": "n_frequency_pattern"},
    allowed={"wavelet_family": ("db1",)},
    free={
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "wavelet_family": "db1",
    },
)
