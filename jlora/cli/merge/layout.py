"""Weights of torch modules as sites of their own, and matrices of sites as such weights.

==============  ========================  =======================  =============================
module          weight in torch           site                     matrix [d_in, d_out]
==============  ========================  =======================  =============================
linear          [out, in]                 `kernel` [in, out]       [in, out]
embedding table [rows, dim]               `embedding`, the same    [rows, dim]
convolution     [out, in, *window]        `kernel`                 [window * in, out]
                                          [*window, in, out]
==============  ========================  =======================  =============================

A shape does not tell a table from a linear layer: the adapter's files do. Sites of Orbax
checkpoints keep their own layout (such as [out, in, *window]), which `kinds` and `ops` tell.

Source: peft 0.21.2, its files; `jlora.io.torch_layout` for convolutions.
Deviates: nothing. `in` of a grouped convolution is that of one group. PEFT's LoRA of one, which
reads all groups at once, is no change of that weight, and is refused by `read`.
"""

from typing import Any

import numpy as np

from jlora.core.site import Site
from jlora.io import torch_layout


def site_of(module: str, shape: tuple[int, ...], dtype: Any, table: bool = False) -> Site:
    """The site of a torch weight of `shape`; `table`: its rows are looked up."""
    if table:
        return Site(f"{module}/embedding", shape, "io", dtype, ("gather",))
    d_out, d_in, *window = shape
    kinds, ops = "i" * len(window) + "io", ("conv",) if window else ("dot",)
    return Site(f"{module}/kernel", (*window, d_in, d_out), kinds, dtype, ops)


def torch_shape(site: Site) -> tuple[int, ...]:
    """The shape in torch of one slice of a site."""
    if "gather" in site.ops:
        return (site.d_in, site.d_out)
    return torch_layout.first_shape(site.slice(), site.d_out)


def to_torch(site: Site, matrix: np.ndarray) -> np.ndarray:
    """[d_in, d_out] of one slice -> as torch has it."""
    return matrix if "gather" in site.ops else torch_layout.first(site.slice(), matrix)


def from_torch(site: Site, weight: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`, of an array of `torch_shape`."""
    return weight if "gather" in site.ops else torch_layout.of_first(site.slice(), weight)
