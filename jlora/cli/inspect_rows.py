"""What `jlora inspect` finds of every site: a row, the rows as text, the cosines of a bank.

With s the singular values of a delta D,

.. math:: \\text{norm} = |D|_F = \\Big(\\sum_k s_k^2\\Big)^{1/2}, \\qquad
          \\text{stable rank} = |D|_F^2 / s_1^2

A stacked site has the mean over its layers; a bank the mean over its adapters.

Reference: Rudelson and Vershynin 2007, arXiv:math/0503442 (stable rank).
Deviates: nothing.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jlora import algebra
from jlora.core.adapter import Adapter
from jlora.core.method import Method, innermost
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Row:
    """One site."""

    site: str  # path
    method: str  # "LoRA"
    shape: tuple[int, ...]  # of the leaf
    rank: int | None  # None for methods without one
    alpha: float | None  # scale * rank; None for methods without a scale
    parameters: int  # trained, of one adapter
    norm: float | None  # of the delta, Frobenius; None when it needs the base's weights
    top: float | None  # largest singular value
    stable_rank: float | None  # norm^2 / top^2
    spectrum: tuple[float, ...]  # singular values, mean over stack and bank


def rank_of(method: Method) -> int | None:
    """The rank of a method, or of the one that it wraps.

    Args:
      method: of a site.

    Returns:
      None for methods without a rank.
    """
    return getattr(innermost(method), "rank", None)


def bank_size(adapter: Adapter) -> int | None:
    """How many adapters a bank holds.

    Args:
      adapter: an adapter or a bank.

    Returns:
      N; None for a single adapter.
    """
    for site, _ in adapter.sites:
        own = {**adapter.frozen.get(site.path, {}), **adapter.trainable.get(site.path, {})}
        if "scale" in own:  # one number per stack slice
            return own["scale"].shape[0] if own["scale"].ndim > len(site.stack) else None
        if "a" in own and "b" in own:  # two axes per stack slice
            return own["a"].shape[0] if own["a"].ndim > len(site.stack) + 2 else None
    return None


def rows(adapter: Adapter, dense: dict[str, Dynamic] | None = None) -> list[Row]:
    """One row per site.

    Args:
      adapter: an adapter or a bank.
      dense: path -> delta [*stack, d_in, d_out] of sites whose delta has no factors, where known.

    Returns:
      One row per site, in their order.
    """
    size, out = bank_size(adapter), []
    for site, method in adapter.sites:
        one = Adapter(
            {k: adapter.trainable[k] for k in (site.path, site.group) if k in adapter.trainable},
            {k: adapter.frozen[k] for k in (site.path, site.group) if k in adapter.frozen},
            ((site, method),),
        )
        own = {**one.frozen.get(site.path, {}), **one.trainable.get(site.path, {})}
        rank = rank_of(method)
        scale = np.asarray(own["scale"], np.float64) if "scale" in own else None
        alpha = float(scale.mean() * rank) if scale is not None and rank else None
        s = _spectrum(one, size is not None, (dense or {}).get(site.path))
        count = sum(t.size for t in one.trainable.get(site.path, {}).values()) // (size or 1)
        norm, top = (
            (None, None) if s is None else (_mean(np.sqrt((s**2).sum(-1))), _mean(s[..., 0]))
        )
        stable = None if s is None or not top else _mean((s**2).sum(-1) / np.square(s[..., 0]))
        out.append(
            Row(
                site=site.path,
                method=type(method).__name__,
                shape=site.shape,
                rank=rank,
                alpha=alpha,
                parameters=count,
                norm=norm,
                top=top,
                stable_rank=stable,
                spectrum=() if s is None else tuple(s.reshape(-1, s.shape[-1]).mean(0).tolist()),
            )
        )
    return out


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x))


def _spectrum(one: Adapter, bank: bool, dense: Dynamic) -> np.ndarray | None:
    """Singular values [..., k] of the only site of `one`; None without factors or a dense delta."""
    if dense is not None:
        return np.linalg.svd(np.asarray(dense, np.float64), compute_uv=False)
    try:
        read = jax.vmap(algebra.deltas) if bank else algebra.deltas
        values = algebra.singular_values(read(one))
    except TypeError:
        return None
    return np.asarray(next(iter(values.values())), np.float64)


def similarity(adapter: Adapter) -> np.ndarray | None:
    """The cosines of a bank.

    Args:
      adapter: an adapter or a bank.

    Returns:
      [N, N]; None for one adapter, or without factors.
    """
    if bank_size(adapter) is None:
        return None
    try:
        return np.asarray(algebra.similarity(adapter))
    except TypeError:
        return None


def table(entries: Sequence[Row]) -> str:
    """The rows as aligned text.

    Args:
      entries: one row per site.

    Returns:
      The text.
    """
    head = ("site", "method", "shape", "rank", "alpha", "parameters", "norm", "s1", "stable rank")
    lines = [
        (
            r.site,
            r.method,
            "x".join(map(str, r.shape)),
            _text(r.rank),
            _text(r.alpha),
            f"{r.parameters:,}",
            _text(r.norm),
            _text(r.top),
            _text(r.stable_rank),
        )
        for r in entries
    ]
    width = [max(len(line[k]) for line in (head, *lines)) for k in range(len(head))]
    left = 3  # text columns
    aligned = []
    for line in (head, *lines):
        cells = list(zip(line, width, strict=True))
        aligned.append(
            "  ".join([c.ljust(w) for c, w in cells[:left]] + [c.rjust(w) for c, w in cells[left:]])
        )
    return "\n".join(line.rstrip() for line in aligned)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
