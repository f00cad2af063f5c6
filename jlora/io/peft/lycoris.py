"""PEFT tables of LoHa and LoKr, of convolutions too (LyCORIS in PEFT's layout).

With win the window, n its size, R the rank, i1 i2 the channels in and o1 o2 those out:

=================================  ==============================  ================================
of a convolution                   PEFT's tensors                  ours
=================================  ==============================  ================================
LoHa                               hada_w1_b [R, in n]             a1 [d_in, R]
LoHa, `use_effective_conv2d`       hada_w1_a [R, out],             b1 [R, out],
                                   hada_w1_b [R, in],              a1 [in, R],
                                   hada_t1 [R, R, \\*win]           t1 [n, 1, R, R] or [1, n, R, R]
LoKr, W2 whole, 2-D                lokr_w2 [o2, i2, \\*win]         w2 [n, i2, o2] or [i2 n, o2]
LoKr, W2 factored                  lokr_w2_b [R, i2 n]             a2 [n, i2, R] or [i2 n, R]
LoKr, `use_effective_conv2d`       lokr_w2_a [R, o2],              b2 [R, o2],
                                   lokr_w2_b [R, i2],              a2 [i2, R],
                                   lokr_t2 [R, R, \\*win]           t2 [n, 1, R, R] or [1, n, R, R]
LoKr, W2 whole, 1-D                lokr_w2 [o2, i2, n]             w2 [n, i2, 1, o2] or
                                                                   [1, i2, n, o2], `swapped`
three-dimensional                  none                            as above, not written
=================================  ==============================  ================================

(the first of two for kernels with the window before the channels, the second for the others).
W2 whole of a one-dimensional convolution: PEFT multiplies w1 [o1, i1] with w2 [o2, i2, n] as arrays
of three axes, so that the axes of w1 meet the last two of w2, and then reshapes; what it computes
and trains is W2 ⊗ W1 at each place of the window, where a factored W2, a two-dimensional
convolution and LyCORIS have W1 ⊗ W2. A window of one has `use_effective_conv2d` ignored; a core of
a one-dimensional convolution ends in an axis of one (with LoKr and rank 1, torch 2.13 cannot
compute PEFT's product of it).

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jlora.core.conv import window
from jlora.core.site import Site
from jlora.io import torch_layout
from jlora.io.kohya import layout as lycoris_layout
from jlora.io.kohya.layout import (
    CORED_LAYOUTS,
    CORES,
    HADA,
    LOKR_LAYOUTS,
    read_hada,
    read_kron,
    write_hada,
    write_kron,
)
from jlora.io.peft.table import Arrays, Read, Slice, Table, alpha_of, scale_of, trim
from jlora.methods.kronecker.lokr import LoKr, split
from jlora.methods.low_rank.loha import LoHa
from jlora.types import Json

PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
LYCORIS_FREE = {
    "init_weights": True,
    "module_dropout": 0.0,
    "rank_dropout": 0.0,
}
TUCKER = "use_effective_conv2d"


def _window(site: Site) -> tuple[int, ...]:
    """The window as PEFT has it, () of a matrix."""
    window = lycoris_layout.torch_window(site)
    if len(window) > 2:
        raise ValueError(f"window {window}, PEFT has one- and two-dimensional convolutions only")
    return window


def _core_shape(rank: int, win: tuple[int, ...]) -> tuple[int, ...]:
    return (rank, rank, *win, *(1,) * (2 - len(win)))


# --- LoHa: delta^T = scale (w1_a w1_b) * (w2_a w2_b) --------------------------------------------


def _write_loha(method: LoHa, site: Site, p: Arrays) -> Slice | None:
    win = _window(site)
    if not any(array.any() for name, array in p.items() if name != "scale"):
        return None
    rank, p = (method.rank, p) if "t1" in p else trim(p, method.rank_axes)
    tensors = write_hada(site, p, _core_shape(rank, win))
    alpha = alpha_of(method, p["scale"], rank)
    return Slice(tensors, {"r": rank, "alpha": alpha, TUCKER: method.tucker})


def _read_loha(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    rank, alpha = fields["r"], fields["alpha"]
    method = LoHa(rank=rank, alpha=alpha, tucker=fields[TUCKER])
    win = _window(site)
    cored = method.tucker and math.prod(win) > 1
    if cored != (set(CORES) <= set(t)):
        raise ValueError(f"got {sorted(t)} with {TUCKER} = {method.tucker}")
    arrays = read_hada(site, t, rank, _core_shape(rank, win))
    return Read(method, arrays, {"scale": scale_of(alpha, rank)})


# --- LoKr: delta^T = scale w1 (x) w2, each whole or a product -----------------------------------


def _lokr_shapes(site: Site, fields: Mapping[str, Json]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes that PEFT makes for one module."""
    rank, factor, win = fields["r"], fields["decompose_factor"], _window(site)
    if factor != -1 and factor < 1:
        raise ValueError(f"decompose_factor = {factor}, expected -1 or at least 1")
    dims = (window(site)[1], site.d_out)
    (i1, i2), (o1, o2) = (split(d, None if factor < 0 else factor) for d in dims)
    if fields["decompose_both"] and rank < max(o1, i1) / 2:
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1_a": (o1, rank), "lokr_w1_b": (rank, i1)}
    else:
        shapes = {"lokr_w1": (o1, i1)}
    if rank >= max(o2, i2) / 2:
        return shapes | {"lokr_w2": (o2, i2, *win)}
    if fields[TUCKER] and math.prod(win) > 1:
        core = {"lokr_t2": _core_shape(rank, win)}
        return shapes | core | {"lokr_w2_a": (rank, o2), "lokr_w2_b": (rank, i2)}
    return shapes | {"lokr_w2_a": (o2, rank), "lokr_w2_b": (rank, i2 * math.prod(win))}


def _check_lokr(site: Site, t: Arrays, fields: Mapping[str, Json]) -> None:
    got, want = {key: array.shape for key, array in t.items()}, _lokr_shapes(site, fields)
    if got != want:
        raise ValueError(f"got {got}, PEFT makes {want} of {dict(fields)}")


def _write_lokr(method: LoKr, site: Site, p: Arrays) -> Slice | None:
    if not any(array.any() for name, array in p.items() if name != "scale"):
        return None
    axes = {name: axis for name, axis in method.rank_axes.items() if name in p}
    rank, p = trim(p, axes) if axes and "t2" not in p else (method.rank, p)
    fields = {
        "r": rank,
        "alpha": alpha_of(method, p["scale"], rank),
        "decompose_both": method.decompose_both,
        "decompose_factor": -1 if method.factor is None else method.factor,
        TUCKER: method.tucker,
    }
    if "w2" in p and (p["w2"].ndim == 4) != (len(_window(site)) == 1):
        raise ValueError(
            "of a whole W2 and W1 PEFT has the product W2 ⊗ W1 in one-dimensional convolutions "
            f"(swapped=True) and W1 ⊗ W2 elsewhere, got {method}"
        )
    tensors = write_kron(site, p, _core_shape(rank, _window(site)))
    _check_lokr(site, tensors, fields)
    return Slice(tensors, fields)


def _read_lokr(site: Site, t: Arrays, fields: Mapping[str, Json]) -> Read:
    t = torch_layout.pointwise(site, t, ("lokr_w2",))
    _check_lokr(site, t, fields)
    rank, alpha, factor = fields["r"], fields["alpha"], fields["decompose_factor"]
    factor = None if factor == -1 else factor
    swapped = len(_window(site)) == 1 and "lokr_w2" in t
    method = LoKr(rank, alpha, factor, fields["decompose_both"], fields[TUCKER], swapped)
    return Read(method, read_kron(site, t, swapped), {"scale": scale_of(alpha, rank)})


LOHA = Table(
    type="LOHA",
    method=LoHa,
    layouts=(tuple(HADA), (*HADA, *CORES)),
    fields={"r": 8, "alpha": 8, TUCKER: False},
    write=_write_loha,
    read=_read_loha,
    patterns=PATTERNS,
    free=LYCORIS_FREE,
    sparse=True,
    convolves=True,
)

LOKR = Table(
    type="LOKR",
    method=LoKr,
    layouts=(*LOKR_LAYOUTS, *CORED_LAYOUTS),
    fields={"r": 8, "alpha": 8, "decompose_both": False, "decompose_factor": -1, TUCKER: False},
    write=_write_lokr,
    read=_read_lokr,
    patterns=PATTERNS,
    free={**LYCORIS_FREE, "rank_dropout_scale": False},
    sparse=True,
    convolves=True,
)
