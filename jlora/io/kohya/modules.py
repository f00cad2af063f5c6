"""One module of a kohya / LyCORIS file: its tensors by suffix, and the method they are.

====== ====================================================== =================================
method suffixes                                               delta^T
====== ====================================================== =================================
LoRA   lora_down.weight [r, in], lora_up.weight [out, r]      alpha / r  up down
LoCon  the same and lora_mid.weight [r, r, *window]            alpha / r  up mid down
DoRA   lora_down, lora_up and dora_scale [out, 1]             see `DoRA`
LoHa   hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and with   alpha / r  (w1_a w1_b) * (w2_a w2_b)
       cores hada_t1, hada_t2
LoKr   lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 the same way, alpha / r  w1 (x) w2
       and with a core lokr_t2
====== ====================================================== =================================

LoCon, LoHa and LoKr with a dora_scale are `Decomposed`, and so is all with a dora_scale [1, in],
the magnitudes per input (`wd_on_output` off). Next to them is the scalar `alpha`; where it is
missing or 0, alpha is r (sd-scripts and LyCORIS never have a scale of 0). A LoKr of two whole
factors has the scale 1 and its rank as alpha; on writing, another scale goes into its second
factor. Of a convolution the factors of LoRA are [r, in, *window] and [out, r, 1, ...], those of
LoCon [r, in, 1, ...] and [out, r, 1, ...], dora_scale is [out, 1, ...] or [1, in, 1, ...], and
`lycoris_layout` says the others; windows have any number of axes, and one of a single point may be
left out or added. The factors of a LoKr may split the channels in any way
(`unbalanced_factorization`, a `factor` above the root).

Source: the files of sd-scripts and LyCORIS 4.1, and what LyCORIS's layers compute from them (its
`get_diff_weight` has alpha / r twice for LoHa and LoKr).
Deviates: norms, biases and full weights are refused.
"""

from __future__ import annotations

import math

import numpy as np

from jlora.core.conv import window
from jlora.core.method import Method
from jlora.core.site import Site
from jlora.io.kohya.layout import (
    CORED_LAYOUTS,
    CORES,
    HADA,
    LOKR_LAYOUTS,
    core,
    read_hada,
    read_kron,
    torch_core,
    torch_window,
    write_hada,
    write_kron,
)
from jlora.io.peft.lora import DORA, LORA, MAGNITUDE, MATRIX
from jlora.io.peft.table import Arrays, Read, scale_of, trim, want_shape
from jlora.io.peft.tables import table_of
from jlora.io.torch_layout import (
    first,
    first_shape,
    magnitude_shape,
    pointwise,
    second,
    second_shape,
)
from jlora.methods.decomposed.decomposed import Decomposed, rows_shape
from jlora.methods.decomposed.dora import DoRA
from jlora.methods.kronecker.lokr import LoKr, split
from jlora.methods.low_rank.locon import LoCon
from jlora.methods.low_rank.loha import LoHa
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic

DOWN, MID, UP = "lora_down.weight", "lora_mid.weight", "lora_up.weight"
DORA_SCALE, ALPHA = "dora_scale", "alpha"
LOHA_LAYOUTS = (set(HADA), {*HADA, *CORES})
SUFFIXES = (  # of all methods, without alpha
    *(DOWN, MID, UP, DORA_SCALE, *HADA, *CORES),
    *dict.fromkeys(key for layout in (*LOKR_LAYOUTS, *CORED_LAYOUTS) for key in layout),
)


def read(site: Site, t: Arrays) -> Read:
    """One module's tensors; their suffixes say which method it is.

    Args:
      site: of one slice.
      t: suffix -> tensor.

    Returns:
      The method and its arrays.

    Raises:
      ValueError: no known set of suffixes, or a shape that does not fit the site.
    """
    alpha = alpha_of(t)
    t = {key: array for key, array in t.items() if key != ALPHA}
    for together in ((DOWN, UP), ("lokr_w2",), (DORA_SCALE,)):
        t = pointwise(site, t, together)
    keys = set(t)
    by = _side(site, t[DORA_SCALE]) if DORA_SCALE in keys else None
    if by == "in" or (by and keys != {DOWN, UP, DORA_SCALE}):
        return _read_decomposed(site, t, alpha, by)
    if keys in ({DOWN, UP}, {DOWN, UP, DORA_SCALE}):
        rank = t[DOWN].shape[0] if t[DOWN].ndim else 0
        want_shape(DOWN, t[DOWN], first_shape(site, rank))
        want_shape(UP, t[UP], second_shape(site, rank))
        fields = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
        fields |= {"use_rslora": False, "lora_dropout": 0.0}
        renamed = {MATRIX[0]: t[DOWN], MATRIX[1]: t[UP]}
        if DORA_SCALE not in t:
            return LORA.read(site, renamed, fields)
        m = t[DORA_SCALE].reshape(magnitude_shape(site))
        return DORA.read(site, {**renamed, MAGNITUDE: m}, fields)
    if keys == {DOWN, MID, UP}:
        return _read_locon(site, t, alpha)
    if keys in LOHA_LAYOUTS:
        rank = t["hada_w1_b"].shape[0] if t["hada_w1_b"].ndim else 0
        method = LoHa(rank, float(rank) if alpha is None else alpha, tucker="hada_t1" in t)
        arrays = read_hada(site, t, rank, (rank, rank, *torch_window(site)))
        return Read(method, arrays, {"scale": scale_of(method.alpha, rank)})
    if any(keys == set(layout) for layout in (*LOKR_LAYOUTS, *CORED_LAYOUTS)):
        return _read_lokr(site, t, alpha)
    raise ValueError(f"got {sorted(t)}, which is no LoRA, LoCon, DoRA, LoHa or LoKr")


def sparse(method: Method) -> bool:
    """Whether absent layers of a stack may be zeros.

    Args:
      method: of the layers that are there.

    Returns:
      False where zeros are not the method's identity.
    """
    if isinstance(method, Decomposed | LoCon):
        return isinstance(method, LoCon)
    return table_of(method).sparse


def _side(site: Site, m: np.ndarray) -> str:
    """Whose magnitudes a dora_scale has, "out" or "in"."""
    shapes = {by: _magnitude(site, by) for by in ("out", "in")}
    for by, shape in shapes.items():
        if m.shape == shape:
            return by
    expected = " or ".join(str(list(shape)) for shape in shapes.values())
    raise ValueError(f"{DORA_SCALE} has shape {list(m.shape)}, expected {expected}")


def _read_decomposed(site: Site, t: Arrays, alpha: float | None, by: str) -> Read:
    declared = {} if alpha is None else {ALPHA: np.asarray(alpha)}
    inner = read(site, {key: array for key, array in t.items() if key != DORA_SCALE} | declared)
    m = t[DORA_SCALE].reshape(rows_shape(site) if by == "in" else site.d_out)
    return Read(Decomposed(inner.method, by), inner.trainable | {"m": m}, inner.frozen)


def _read_locon(site: Site, t: Arrays, alpha: float | None) -> Read:
    rank = t[MID].shape[0] if t[MID].ndim else 0
    if not torch_window(site):
        raise ValueError(f"got {MID} for a matrix, which has no window")
    for key, shape in _locon_shapes(site, rank).items():
        want_shape(key, t[key], shape)
    method = LoCon(rank, float(rank) if alpha is None else alpha)
    arrays = {"a": t[DOWN].reshape(rank, -1).T, "b": t[UP].reshape(site.d_out, rank).T}
    arrays["t"] = core(t[MID], window(site)[0])
    return Read(method, arrays, {"scale": scale_of(method.alpha, rank)})


def _locon_shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    win = torch_window(site)
    ones = (1,) * len(win)
    down, up = (rank, window(site)[1], *ones), (site.d_out, rank, *ones)
    return {DOWN: down, MID: (rank, rank, *win), UP: up}


def _read_lokr(site: Site, t: Arrays, alpha: float | None) -> Read:
    win, channels = torch_window(site), window(site)[1]
    (o1, i1), ranks = _sides(t, "lokr_w1", (), 1)
    if "lokr_t2" in t:
        r, o2 = _matrix(t, "lokr_w2_a")
        want_shape("lokr_w2_b", t["lokr_w2_b"], (r, channels // i1 if i1 else 0))
        want_shape("lokr_t2", t["lokr_t2"], (r, r, *win))
        i2, ranks = t["lokr_w2_b"].shape[1], ranks | {r}
    else:
        (o2, i2), more = _sides(t, "lokr_w2", win, math.prod(win))
        ranks |= more
    if len(ranks) > 1 or 0 in ranks:
        raise ValueError(f"got {_shapes(t)}, expected one rank")
    if (o1 * o2, i1 * i2) != (site.d_out, channels):
        product = (o1 * o2, i1 * i2, *win)
        raise ValueError(
            f"got {_shapes(t)}, which make {product}, not {(site.d_out, channels, *win)}"
        )
    whole = not ranks
    if whole:  # alpha is no scale; LyCORIS writes the rank it was asked for
        rank = int(alpha) if alpha is not None and alpha >= 1 and alpha == int(alpha) else 1
        alpha = float(rank)
    else:
        rank = ranks.pop()
    method = LoKr(
        rank,
        float(rank) if alpha is None else alpha,
        _factor((channels, i1), (site.d_out, o1)),
        decompose_both="lokr_w1_a" in t,
        tucker="lokr_t2" in t,
    )
    return Read(method, read_kron(site, t), {"scale": scale_of(method.alpha, rank)})


def _sides(t: Arrays, name: str, win: tuple[int, ...], size: int) -> tuple[tuple[int, int], set]:
    """(outputs, inputs) of one factor of a LoKr with a window of `size`, and its ranks."""
    if name in t:
        shape = t[name].shape
        if shape[2:] != win or len(shape) < 2:
            raise ValueError(f"{name} has shape {list(shape)}, expected [out, in, *{list(win)}]")
        return (shape[0], shape[1]), set()
    (out, r), (s, inner) = _matrix(t, f"{name}_a"), _matrix(t, f"{name}_b")
    if inner % size:
        raise ValueError(f"{name}_b has {inner} columns, expected a multiple of {size}")
    return (out, inner // size), {r, s}


def _matrix(t: Arrays, key: str) -> tuple[int, int]:
    if t[key].ndim != 2:
        raise ValueError(f"{key} has shape {list(t[key].shape)}, expected a matrix")
    return t[key].shape[0], t[key].shape[1]


def _factor(*sides: tuple[int, int]) -> int | None:
    """The `LoKr.factor` that splits each dimension with this first part; None where none does."""
    known = (None, *sorted({first for _, first in sides}))
    return next((f for f in known if all(split(d, f)[0] == m for d, m in sides)), None)


def write(site: Site, method: Dynamic, p: Arrays) -> Arrays:
    """The tensors of one slice.

    Args:
      site: of the slice.
      method: its method.
      p: our arrays by name.

    Returns:
      Suffix -> tensor; empty where the slice is zero padding.

    Raises:
      ValueError: the format has no place for it.
    """
    if isinstance(method, Decomposed):
        tensors = write(site, method.method, {name: p[name] for name in p if name != "m"})
        if not tensors:
            raise ValueError(
                "the delta is zero, which this format cannot represent together with dora_scale"
            )
        return tensors | {DORA_SCALE: p["m"].reshape(_magnitude(site, method.by))}
    if type(method) not in (LoRA, LoCon, DoRA, LoHa, LoKr):
        raise ValueError(f"this format has no place for {type(method).__name__}")
    if "gather" in site.ops:
        raise ValueError("this format has no place for tables")
    if "w2" in p and p["w2"].ndim == 4:
        raise ValueError("this format has no place for a swapped LoKr, W2 ⊗ W1")
    axes = {name: axis for name, axis in method.rank_axes.items() if name in p}
    if not any(array.any() for name, array in p.items() if name != "scale"):
        axes, rank = {}, 0
    elif axes and not {"t", "t1", "t2"} & set(p):
        rank, p = trim(p, axes)
    else:
        rank = method.rank
    if rank == 0:
        if isinstance(method, DoRA):
            raise ValueError("a and b are zero, which this format cannot say of DoRA")
        return {}
    core_shape = (rank, rank, *torch_window(site))
    dtype = next(array.dtype for name, array in p.items() if name != "scale")
    if isinstance(method, LoKr) and not axes:
        if p["scale"] != 1:  # two whole factors have the scale 1 in this format
            p = {**p, "w2": p["w2"] * p["scale"]}
        return {ALPHA: np.asarray(rank, dtype), **write_kron(site, p, core_shape)}
    alpha = {ALPHA: _exact_alpha(p["scale"], rank, dtype)}
    if isinstance(method, LoKr):
        return alpha | write_kron(site, p, core_shape)
    if isinstance(method, LoHa):
        return alpha | write_hada(site, p, core_shape)
    if "t" in p:
        shapes = _locon_shapes(site, rank)
        down, up = p["a"].T.reshape(shapes[DOWN]), p["b"].T.reshape(shapes[UP])
        return alpha | {DOWN: down, MID: torch_core(p["t"], core_shape), UP: up}
    tensors = alpha | {DOWN: first(site, p["a"]), UP: second(site, p["b"])}
    if isinstance(method, DoRA):
        tensors[DORA_SCALE] = p["m"].reshape(_magnitude(site))
    return tensors


def _magnitude(site: Site, by: str = "out") -> tuple[int, ...]:
    sides = (site.d_out, 1) if by == "out" else (1, window(site)[1])
    return (*sides, *(1 for _ in torch_window(site)))


def _exact_alpha(scale: np.ndarray, rank: int, dtype: Dynamic) -> np.ndarray:
    """A scalar with scale == float32(alpha / rank), of the narrowest type that holds it.

    That is the factors' `dtype`, which LyCORIS gives it, or else float32 or float64.
    """
    exact = float(scale) * rank
    if exact == 0:
        raise ValueError(
            "the scale is 0, which this format cannot say: alpha 0 is read as the rank"
        )
    for kind in (dtype, np.float32, np.float64):
        for number in (round(exact, 4), exact):
            alpha = np.asarray(number).astype(kind)
            if scale_of(float(alpha), rank) == scale:
                return alpha
    raise ValueError(f"no alpha gives the scale {float(scale)!r} at rank {rank}")


def alpha_of(t: Arrays) -> float | None:
    """The alpha of a module.

    Args:
      t: suffix -> tensor.

    Returns:
      The number; None where it is missing or 0, which both stand for the rank.

    Raises:
      ValueError: it is not one number.
    """
    if ALPHA not in t:
        return None
    if t[ALPHA].size != 1:
        raise ValueError(f"alpha has shape {list(t[ALPHA].shape)}, expected one number")
    return float(t[ALPHA].astype(np.float64).reshape(())) or None


def _shapes(t: Arrays) -> dict[str, tuple[int, ...]]:
    return {key: array.shape for key, array in t.items()}
