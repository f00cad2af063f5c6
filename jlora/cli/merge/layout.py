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

import numpy as np
from jaxtyping import Float

from jlora.core.site import Site
from jlora.io import torch_layout
from jlora.types import Dynamic


def site_of(module: str, shape: tuple[int, ...], dtype: Dynamic, table: bool = False) -> Site:
    """The site of a torch weight.

    Args:
      module: the name of its module.
      shape: of the weight in torch.
      dtype: of the weight.
      table: whether its rows are looked up; False, as for most.

    Returns:
      ``<module>/kernel``, or ``<module>/embedding`` of a table.
    """
    if table:
        return Site(f"{module}/embedding", shape, "io", dtype, ("gather",))
    d_out, d_in, *window = shape
    kinds, ops = "i" * len(window) + "io", ("conv",) if window else ("dot",)
    return Site(f"{module}/kernel", (*window, d_in, d_out), kinds, dtype, ops)


def torch_shape(site: Site) -> tuple[int, ...]:
    """The shape in torch of one slice of a site.

    Args:
      site: with or without a stack.

    Returns:
      As `to_torch` gives it.
    """
    if "gather" in site.ops:
        return (site.d_in, site.d_out)
    return torch_layout.first_shape(site.slice(), site.d_out)


def to_torch(site: Site, matrix: Float[np.ndarray, "d_in d_out"]) -> np.ndarray:
    """One slice of a site as torch has it.

    Args:
      site: with or without a stack.
      matrix: of the slice.

    Returns:
      An array of `torch_shape`.
    """
    return matrix if "gather" in site.ops else torch_layout.first(site.slice(), matrix)


def from_torch(site: Site, weight: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`.

    Args:
      site: with or without a stack.
      weight: of `torch_shape`.

    Returns:
      [d_in, d_out].
    """
    return weight if "gather" in site.ops else torch_layout.of_first(site.slice(), weight)
