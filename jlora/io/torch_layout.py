"""The two factors of a site as torch has them: transposed, and those of a convolution unfolded.

A convolution's matrix has the inputs under its window as d_in. The site's kernel has them as
[*window, in] with the outputs last (Flax), or as [in, *window] with the outputs first (torch).

========  =============  ============================  =====================================
factor    ours           torch, of a matrix            torch, of a convolution
========  =============  ============================  =====================================
first     [d_in, r]      [r, d_in]                     [r, in, *window]
second    [r, d_out]     [d_out, r]                    [d_out, r, 1, ...]
flat      [d_in, r]      [r, d_in]                     [r, in * window]
========  =============  ============================  =====================================

A window of one point is none: a file of such a convolution (SD 1.5's `proj_in`) may be read for a
matrix (SD 2's), and the other way round, see `pointwise`.

Source: peft 0.21.2, its files.
Deviates: nothing. Grouped convolutions are not told from others by their site: PEFT's second
factor of them is smaller, so their files are refused, here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from jlora.core.site import Site


def is_conv(site: Site) -> bool:
    """Whether a site is the kernel of a convolution.

    Args:
      site: with what consumes it.

    Returns:
      False for a matmul or a lookup.
    """
    return "conv" in site.ops


def _patch(site: Site) -> tuple[int, tuple[int, ...], bool]:
    """(channels in, window, whether the channels are the last of the kernel's 'i' axes)."""
    sizes = tuple(n for n, kind in zip(site.shape, site.kinds, strict=True) if kind == "i")
    kinds = site.kinds.replace("s", "")
    if len(sizes) < 2 or kinds.count("o") != 1 or "o" not in (kinds[0], kinds[-1]):
        raise ValueError(f"kinds {site.kinds!r} are not those of a convolution's kernel")
    last = kinds[-1] == "o"
    return (sizes[-1], sizes[:-1], True) if last else (sizes[0], sizes[1:], False)


def first(site: Site, a: Shaped[np.ndarray, "d_in r"]) -> np.ndarray:
    """Torch's first factor.

    Args:
      site: of the weight.
      a: our first factor.

    Returns:
      [r, d_in], or of a convolution [r, in, *window].
    """
    if not is_conv(site):
        return a.T
    channels, window, last = _patch(site)
    if not last:
        return a.T.reshape(-1, channels, *window)
    return np.moveaxis(a.reshape(*window, channels, -1), (-1, -2), (0, 1))


def second(site: Site, b: Shaped[np.ndarray, "r d_out"]) -> np.ndarray:
    """Torch's second factor.

    Args:
      site: of the weight.
      b: our second factor.

    Returns:
      [d_out, r], or of a convolution [d_out, r, 1, ...].
    """
    return b.T.reshape(second_shape(site, b.shape[0]))


def flat(site: Site, a: Shaped[np.ndarray, "d_in r"]) -> np.ndarray:
    """The first factor with torch's order of inputs, the window flattened.

    Args:
      site: of the weight.
      a: our first factor.

    Returns:
      [r, d_in].
    """
    return first(site, a).reshape(a.shape[1], -1)


def first_shape(site: Site, rank: int) -> tuple[int, ...]:
    """The shape of torch's first factor.

    Args:
      site: of the weight.
      rank: r.

    Returns:
      As `first` gives it.
    """
    channels, window, _ = _patch(site) if is_conv(site) else (site.d_in, (), True)
    return (rank, channels, *window)


def second_shape(site: Site, rank: int) -> tuple[int, ...]:
    """The shape of torch's second factor.

    Args:
      site: of the weight.
      rank: r.

    Returns:
      As `second` gives it.
    """
    return (
        (site.d_out, rank, *(1 for _ in _patch(site)[1]))
        if is_conv(site)
        else (
            site.d_out,
            rank,
        )
    )


def of_first(site: Site, t: np.ndarray) -> np.ndarray:
    """The inverse of `first`.

    Args:
      site: of the weight.
      t: of `first_shape`.

    Returns:
      [d_in, r].
    """
    if not is_conv(site) or not _patch(site)[2]:
        return t.reshape(t.shape[0], -1).T
    return np.moveaxis(t, (0, 1), (-1, -2)).reshape(-1, t.shape[0])


def of_second(site: Site, t: np.ndarray) -> np.ndarray:
    """The inverse of `second`.

    Args:
      site: of the weight.
      t: of `second_shape`.

    Returns:
      [r, d_out].
    """
    return t.reshape(t.shape[:2]).T


def of_flat(site: Site, t: Shaped[np.ndarray, "r d_in"]) -> np.ndarray:
    """The inverse of `flat`.

    Args:
      site: of the weight.
      t: with torch's order of inputs.

    Returns:
      [d_in, r].
    """
    return of_first(site, t.reshape(first_shape(site, t.shape[0])))


def pointwise(
    site: Site, t: Mapping[str, np.ndarray], keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """Tensors of a window of one point as the site has them, as a matrix or as a convolution.

    They change together or not at all: if one has a window and one has none, they are left alone.

    Args:
      site: of the weight.
      t: suffix -> tensor.
      keys: the suffixes that may change: [n, m, 1, ...] or [n, m].

    Returns:
      All tensors.
    """
    window = first_shape(site, 1)[2:]
    sizes = {t[key].ndim for key in keys if key in t}
    tails = {n for key in keys if key in t for n in t[key].shape[2:]}
    if set(window) - {1} or len(sizes) != 1 or min(sizes) < 2 or tails - {1}:
        return dict(t)
    return {
        key: array.reshape(*array.shape[:2], *window) if key in keys else array
        for key, array in t.items()
    }


def magnitude_shape(site: Site) -> tuple[int, ...]:
    """The shape of DoRA's magnitude as PEFT has it.

    Args:
      site: of the weight.

    Returns:
      (d_out,), or of a convolution (1, d_out, 1, ...).
    """
    ones = (1,) * (len(first_shape(site, 1)) - 2)
    return (1, site.d_out, *ones) if is_conv(site) else (site.d_out,)
