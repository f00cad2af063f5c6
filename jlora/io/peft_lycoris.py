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
LoKr, W2 whole, 1-D                lokr_w2 [o2, i2, n]             none, refused
three-dimensional                  none                            as above, not written
=================================  ==============================  ================================

(the first of two for kernels with the window before the channels, the second for the others).
W2 whole of a one-dimensional convolution: PEFT multiplies w1 [o1, i1] with w2 [o2, i2, n] as arrays
of three axes, so that w1 meets the window: output channel o2 o1 and input channel i2 i1 in that
order, no product W1 ⊗ W2. A window of one has `use_effective_conv2d` ignored; a core of a
one-dimensional convolution ends in an axis of one (with LoKr and rank 1, torch 2.13 cannot compute
PEFT's product of it).

Source: peft 0.21.2, its files and read for its behaviour.
Deviates: none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.core.adapter import Site
from jlora.core.conv import window
from jlora.io import torch_layout
from jlora.io.peft_table import Arrays, Read, Slice, Table, alpha_of, scale_of, trim, want_shape
from jlora.methods.loha import LoHa
from jlora.methods.lokr import LoKr, split

PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}
LYCORIS_FREE = {
    "init_weights": True,
    "module_dropout": 0.0,
    "rank_dropout": 0.0,
}
TUCKER = "use_effective_conv2d"


def _window(site: Site) -> tuple[int, ...]:
    """The window as PEFT has it, () of a matrix."""
    found = torch_layout.first_shape(site, 1)[2:]
    if len(found) > 2:
        raise ValueError(f"window {found}, PEFT has one- and two-dimensional convolutions only")
    return found


def _core(t: np.ndarray, before: int) -> np.ndarray:
    """PEFT's core [r of the outputs, r of the inputs, *window] -> [before, after, r, r]."""
    t = t.reshape(*t.shape[:2], before, -1)
    return t.transpose(2, 3, 1, 0)


def _torch_core(t: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_core`, in PEFT's `shape`."""
    return t.transpose(3, 2, 0, 1).reshape(shape)


def _core_shape(rank: int, win: tuple[int, ...]) -> tuple[int, ...]:
    return (rank, rank, *win, *(1,) * (2 - len(win)))


# --- LoHa: delta^T = scale (w1_a w1_b) * (w2_a w2_b) --------------------------------------------

HADA = {"hada_w1_a": "b1", "hada_w1_b": "a1", "hada_w2_a": "b2", "hada_w2_b": "a2"}


CORES = {"hada_t1": "t1", "hada_t2": "t2"}


def _write_loha(method: LoHa, site: Site, p: Arrays) -> Slice | None:
    win = _window(site)
    if "t1" in p:
        if not any(array.any() for name, array in p.items() if name != "scale"):
            return None
        rank = method.rank
        tensors = {key: p[name].T if name[0] == "a" else p[name] for key, name in HADA.items()}
        shape = _core_shape(rank, win)
        tensors |= {key: _torch_core(p[name], shape) for key, name in CORES.items()}
    else:
        rank, p = trim(p, method.rank_axes)
        if rank == 0:
            return None
        tensors = write_hada(site, p)
    alpha = alpha_of(method, p["scale"], rank)
    return Slice(tensors, {"r": rank, "alpha": alpha, TUCKER: method.tucker})


def write_hada(site: Site, p: Arrays) -> Arrays:
    """The four factors by key."""
    return {
        key: torch_layout.flat(site, p[name]) if name[0] == "a" else p[name].T
        for key, name in HADA.items()
    }


def _read_loha(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    rank, alpha = fields["r"], fields["alpha"]
    method = LoHa(rank=rank, alpha=alpha, tucker=fields[TUCKER])
    frozen = {"scale": scale_of(alpha, rank)}
    before, channels, after = window(site)
    cored = method.tucker and before * after > 1
    if cored != (set(CORES) <= set(t)):
        raise ValueError(f"got {sorted(t)} with {TUCKER} = {method.tucker}")
    if cored:
        for key, name in HADA.items():
            want_shape(key, t[key], (rank, site.d_out if name[0] == "b" else channels))
        for key in CORES:
            want_shape(key, t[key], _core_shape(rank, _window(site)))
        made = {name: t[key].T if name[0] == "a" else t[key] for key, name in HADA.items()}
        made |= {name: _core(t[key], before) for key, name in CORES.items()}
        return Read(method, made, frozen)
    for key in HADA:
        want_shape(key, t[key], (site.d_out, rank) if key.endswith("a") else (rank, site.d_in))
    trainable = {
        name: torch_layout.of_flat(site, t[key]) if name[0] == "a" else t[key].T
        for key, name in HADA.items()
    }
    return Read(method, trainable, frozen)


# --- LoKr: delta^T = scale w1 (x) w2, each whole or a product -----------------------------------

WHOLE = {"lokr_w1": "w1", "lokr_w2": "w2"}
LOKR_LAYOUTS = tuple(
    (*first, *second)
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
CORED_LAYOUTS = tuple((*layout, "lokr_t2") for layout in LOKR_LAYOUTS if "lokr_w2_b" in layout)
PARTS = {"lokr_w1_a": "b1", "lokr_w1_b": "a1", "lokr_w2_a": "b2", "lokr_w2_b": "a2"}


def _lokr_shapes(site: Site, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
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
        if len(win) == 1:
            raise ValueError(
                "W2 is whole, and PEFT's product of a one-dimensional convolution is then none of "
                f"W1 and W2; expected a rank below {max(o2, i2) / 2}"
            )
        return shapes | {"lokr_w2": (o2, i2, *win)}
    if fields[TUCKER] and math.prod(win) > 1:
        core = {"lokr_t2": _core_shape(rank, win)}
        return shapes | core | {"lokr_w2_a": (rank, o2), "lokr_w2_b": (rank, i2)}
    return shapes | {"lokr_w2_a": (o2, rank), "lokr_w2_b": (rank, i2 * math.prod(win))}


def _check_lokr(site: Site, t: Arrays, fields: Mapping[str, Any]) -> None:
    got, want = {key: array.shape for key, array in t.items()}, _lokr_shapes(site, fields)
    if got != want:
        raise ValueError(f"got {got}, PEFT makes {want} of {dict(fields)}")


def _second(site: Site, rows: int, cols: int) -> Site:
    """The second factor as a kernel, d_in = `rows` and d_out = `cols`, laid out as the site."""
    before, _, after = window(site)
    inner = rows // (before * after)
    kinds = site.kinds
    channel = kinds.rindex("i") if kinds.endswith("o") else kinds.index("i")
    sizes = {channel: inner, kinds.index("o"): cols}
    shape = tuple(sizes.get(k, n) for k, n in enumerate(site.shape))
    return dataclasses.replace(site, shape=shape)


def _of_rows(site: Site, t: np.ndarray) -> np.ndarray:
    """PEFT's [n, i2 * window] -> ours [window, i2, n] or [i2 * window, n]."""
    if not torch_layout.is_conv(site):
        return t.T
    before = window(site)[0]
    made = torch_layout.of_flat(_second(site, t.shape[1], t.shape[0]), t)
    return made if before == 1 else made.reshape(before, -1, t.shape[0])


def _torch_rows(site: Site, a: np.ndarray) -> np.ndarray:
    """The inverse of `_of_rows`."""
    a = a.reshape(-1, a.shape[-1])
    return torch_layout.flat(_second(site, *a.shape), a) if torch_layout.is_conv(site) else a.T


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
    shapes = _lokr_shapes(site, fields)
    tensors = {key: p[name].T for key, name in {**WHOLE, **PARTS}.items() if name in p}
    if "t2" in p:
        core = _torch_core(p["t2"], _core_shape(rank, _window(site)))
        tensors |= {"lokr_w2_a": p["b2"], "lokr_t2": core}
    else:
        key, name = ("lokr_w2_b", "a2") if "a2" in p else ("lokr_w2", "w2")
        rows = _torch_rows(site, p[name])
        whole = math.prod(shapes.get(key, ())) == rows.size
        tensors[key] = rows.reshape(shapes[key]) if whole else rows
    _check_lokr(site, tensors, fields)
    return Slice(tensors, fields)


def _read_lokr(site: Site, t: Arrays, fields: Mapping[str, Any]) -> Read:
    _check_lokr(site, t, fields)
    rank, alpha, factor = fields["r"], fields["alpha"], fields["decompose_factor"]
    factor = None if factor == -1 else factor
    method = LoKr(rank, alpha, factor, fields["decompose_both"], fields[TUCKER])
    keys = {**WHOLE, **PARTS}
    trainable = {keys[key]: array.T for key, array in t.items() if key in keys}
    if "lokr_t2" in t:
        trainable |= {"b2": t["lokr_w2_a"], "t2": _core(t["lokr_t2"], window(site)[0])}
    else:
        key = "lokr_w2_b" if "lokr_w2_b" in t else "lokr_w2"
        rows = t[key].reshape(t[key].shape[0], -1)
        trainable[keys[key]] = _of_rows(site, rows)
    return Read(method, trainable, {"scale": scale_of(alpha, rank)})


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
