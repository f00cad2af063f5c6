"""How LyCORIS lays out LoHa and LoKr, which PEFT took over: their arrays as ours and back.

With win the window of a convolution (() of a matrix), n its size, R the rank, i1 i2 the channels in
and o1 o2 = d_out; ours with the window before the channels, or else after them:

==================  ===================================  ========================================
of                  tensors                              ours
==================  ===================================  ========================================
LoHa                hada_w1_a [out, R],                  b1 [R, out],
                    hada_w1_b [R, in n]                  a1 [d_in, R]
LoHa, with cores    hada_w1_a [R, out],                  b1 [R, out],
                    hada_w1_b [R, in],                   a1 [in, R],
                    hada_t1 [R, R, \\*win]                t1 [n, 1, R, R] or [1, n, R, R]
LoKr, W1            lokr_w1 [o1, i1], or                 w1 [i1, o1], or
                    lokr_w1_a [o1, R], _b [R, i1]        b1 [R, o1], a1 [i1, R]
LoKr, W2 whole      lokr_w2 [o2, i2, \\*win]              w2 [n, i2, o2] or [i2 n, o2]
LoKr, W2 factored   lokr_w2_a [o2, R],                   b2 [R, o2],
                    lokr_w2_b [R, i2 n]                  a2 [n, i2, R] or [i2 n, R]
LoKr, W2 swapped    lokr_w2 [o2, i2, \\*win]              w2 [n, i2, 1, o2] or [1, i2, n, o2]
LoKr, with a core   lokr_w2_a [R, o2],                   b2 [R, o2],
                    lokr_w2_b [R, i2],                   a2 [i2, R],
                    lokr_t2 [R, R, \\*win]                t2 [n, 1, R, R] or [1, n, R, R]
==================  ===================================  ========================================

(hada_w2_a, hada_w2_b and hada_t2 are as the first three.) A core's first axis meets the outputs.

Source: LyCORIS 4.1 and peft 0.21.2, their files.
Deviates: nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Shaped

from jlora.core.conv import window
from jlora.core.site import Site
from jlora.io import torch_layout
from jlora.io.peft.table import Arrays, want_shape

Shape = tuple[int, ...]
HADA = {"hada_w1_a": "b1", "hada_w1_b": "a1", "hada_w2_a": "b2", "hada_w2_b": "a2"}
CORES = {"hada_t1": "t1", "hada_t2": "t2"}
WHOLE = {"lokr_w1": "w1", "lokr_w2": "w2"}
PARTS = {"lokr_w1_a": "b1", "lokr_w1_b": "a1", "lokr_w2_a": "b2", "lokr_w2_b": "a2"}
LOKR_LAYOUTS = tuple(
    (*first, *second)
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
CORED_LAYOUTS = tuple((*layout, "lokr_t2") for layout in LOKR_LAYOUTS if "lokr_w2_b" in layout)


def torch_window(site: Site) -> Shape:
    """Sizes of a convolution's window.

    Args:
      site: of the weight.

    Returns:
      In torch's order; () of a matrix.
    """
    return torch_layout.first_shape(site, 1)[2:]


def core(t: np.ndarray, before: int) -> np.ndarray:
    """A core as ours.

    Args:
      t: [r of the outputs, r of the inputs, *window].
      before: the product of the window's axes that lie before the channels, see `window`.

    Returns:
      [before, after, r of the inputs, r of the outputs].
    """
    return t.reshape(*t.shape[:2], before, -1).transpose(2, 3, 1, 0)


def torch_core(t: Shaped[np.ndarray, "before after r_in r_out"], shape: Shape) -> np.ndarray:
    """The inverse of `core`.

    Args:
      t: our core.
      shape: of torch's.

    Returns:
      [r of the outputs, r of the inputs, *window].
    """
    return t.transpose(3, 2, 0, 1).reshape(shape)


def read_hada(site: Site, t: Arrays, rank: int, core_shape: Shape) -> Arrays:
    """The arrays of a LoHa.

    Args:
      site: of one slice.
      t: suffix -> tensor.
      rank: R.
      core_shape: of each core, where `t` has any.

    Returns:
      Our arrays by name.

    Raises:
      ValueError: a tensor has another shape.
    """
    before, channels, _ = window(site)
    if "hada_t1" in t:
        for key, name in HADA.items():
            want_shape(key, t[key], (rank, site.d_out if name[0] == "b" else channels))
        for key in CORES:
            want_shape(key, t[key], core_shape)
        arrays = {name: t[key].T if name[0] == "a" else t[key] for key, name in HADA.items()}
        return arrays | {name: core(t[key], before) for key, name in CORES.items()}
    for key in HADA:
        want_shape(key, t[key], (site.d_out, rank) if key.endswith("a") else (rank, site.d_in))
    return {
        name: torch_layout.of_flat(site, t[key]) if name[0] == "a" else t[key].T
        for key, name in HADA.items()
    }


def write_hada(site: Site, p: Arrays, core_shape: Shape) -> Arrays:
    """The inverse of `read_hada`.

    Args:
      site: of one slice.
      p: our arrays by name.
      core_shape: of each core, where `p` has any.

    Returns:
      Suffix -> tensor.
    """
    if "t1" in p:
        tensors = {key: p[name].T if name[0] == "a" else p[name] for key, name in HADA.items()}
        return tensors | {key: torch_core(p[name], core_shape) for key, name in CORES.items()}
    return {
        key: torch_layout.flat(site, p[name]) if name[0] == "a" else p[name].T
        for key, name in HADA.items()
    }


def read_kron(site: Site, t: Arrays, swapped: bool = False) -> Arrays:
    """The arrays of a LoKr whose tensors have the right shapes.

    Args:
      site: of one slice.
      t: suffix -> tensor.
      swapped: as `LoKr` has it; False, as LyCORIS has it.

    Returns:
      Our arrays by name.
    """
    keys = {**WHOLE, **PARTS}
    arrays = {keys[key]: array.T for key, array in t.items() if key in keys and array.ndim == 2}
    if "lokr_t2" in t:
        return arrays | {"b2": t["lokr_w2_a"], "t2": core(t["lokr_t2"], window(site)[0])}
    if swapped:
        w2 = t["lokr_w2"].reshape(*t["lokr_w2"].shape[:2], window(site)[0], -1)
        return arrays | {"w2": w2.transpose(2, 1, 3, 0)}
    key = "lokr_w2_b" if "lokr_w2_b" in t else "lokr_w2"
    return arrays | {keys[key]: _of_rows(site, t[key].reshape(t[key].shape[0], -1))}


def write_kron(site: Site, p: Arrays, core_shape: Shape) -> Arrays:
    """The inverse of `read_kron`.

    Args:
      site: of one slice.
      p: our arrays by name.
      core_shape: of the core, where `p` has one.

    Returns:
      Suffix -> tensor.
    """
    tensors = {key: p[name].T for key, name in {**WHOLE, **PARTS}.items() if name in p}
    if "t2" in p:
        return tensors | {"lokr_w2_a": p["b2"], "lokr_t2": torch_core(p["t2"], core_shape)}
    if "a2" in p:
        return tensors | {"lokr_w2_b": _torch_rows(site, p["a2"])}
    if p["w2"].ndim == 4:
        w2 = p["w2"].transpose(3, 1, 0, 2)
        return tensors | {"lokr_w2": w2.reshape(*w2.shape[:2], *torch_window(site))}
    rows = _torch_rows(site, p["w2"])
    return tensors | {"lokr_w2": rows.reshape(rows.shape[0], -1, *torch_window(site))}


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
    """[n, i2 * window] -> ours [window, i2, n] or [i2 * window, n]."""
    if not torch_layout.is_conv(site):
        return t.T
    before = window(site)[0]
    rows = torch_layout.of_flat(_second(site, t.shape[1], t.shape[0]), t)
    return rows if before == 1 else rows.reshape(before, -1, t.shape[0])


def _torch_rows(site: Site, a: np.ndarray) -> np.ndarray:
    """The inverse of `_of_rows`."""
    a = a.reshape(-1, a.shape[-1])
    return torch_layout.flat(_second(site, *a.shape), a) if torch_layout.is_conv(site) else a.T
