r"""Adapters that carry their start: made from another adapter, and written for other programs.

=========  =======================================================================
W          the weight of a site, [d_in, d_out]
a, b       the trained factors; a0, b0 their frozen copies; s their `scale`
=========  =======================================================================

.. math::
    W' = (W - s a_0 b_0) + s a b = W + s \, [a, a_0] \begin{bmatrix} b \\ -b_0 \end{bmatrix}

`from_adapter` makes one. Programs without frozen copies get either side of the equation: the base
of `residual_leaves` with the adapter of `without_start`, or LoRA of rank 2r by `fold`.

Paper: Meng, Wang and Zhang 2024, PiSSA, arXiv:2404.02948.
Source: paper; `fold` is PEFT's conversion of PiSSA to LoRA.
Deviates: nothing.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.lazy import merged
from jlora.core.lift import check, flatten, is_array
from jlora.core.method import Method
from jlora.core.site import Arrays, Site, unfold
from jlora.inits.start import matrices
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.low_rank.pissa import PiSSA
from jlora.methods.wrappers.residual import Residual
from jlora.types import Tree


def from_adapter(source: Adapter, residual: bool = False) -> Adapter:
    """A new adapter that starts where another one is.

    Args:
      source: one adapter; of methods with factors where `residual` is given.
      residual: subtract the start, so that the function is that of the base.

    Returns:
      The source itself, or its methods in a `Residual` with its values as start.

    Raises:
      ValueError: a bank, a method without factors.
    """
    one_adapter(source, "from_adapter")
    if not residual:
        return source
    frozen = dict(source.frozen)
    for site, _ in source.sites:
        copies = {f"{name}0": t for name, t in source.trainable[site.path].items()}
        frozen[site.path] = {**frozen[site.path], **copies}
    rows = tuple((site, Residual(method)) for site, method in source.sites)
    return source.replace(frozen=frozen, sites=rows)


def fold(adapter: Adapter) -> Adapter:
    """An adapter of LoRA minus its start as LoRA of rank 2r, for files of other programs.

    Args:
      adapter: one adapter, of `PiSSA` or of LoRA in a `Residual`.

    Returns:
      a' = [a, a0], b' = [b; -b0], of the same scale, for the base as it is.

    Raises:
      ValueError: a bank, another method.
    """
    one_adapter(adapter, "fold")
    trainable, frozen, rows = {}, {}, []
    for site, method in adapter.sites:
        p, lora = adapter.arrays(site)[0], _lora_of(site, method)
        a = jnp.concatenate([p["a"], p["a0"].astype(p["a"].dtype)], axis=-1)
        b = jnp.concatenate([p["b"], -p["b0"].astype(p["b"].dtype)], axis=-2)
        trainable[site.path], frozen[site.path] = {"a": a, "b": b}, {"scale": p["scale"]}
        factor = math.sqrt(2) if lora.rslora else 2
        rows.append((site, dataclasses.replace(
            lora, rank=2 * lora.rank, alpha=factor * lora.alpha, freeze_a=False)))  # fmt: skip
    return Adapter(trainable, frozen, tuple(rows))


def residual_leaves(params: Tree, adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """The weights without the start of an adapter, leaf by leaf: what PEFT keeps as the base.

    Args:
      params: the weights.
      adapter: one adapter, of `PiSSA` or of a method in a `Residual`.

    Yields:
      (path, W - s a0 b0) of every adapted leaf, in its layout and dtype; one exists at a time.

    Raises:
      ValueError: a bank, another method, a site that is not in `params`, an abstract weight.
    """
    one_adapter(adapter, "residual_leaves")
    leaves, _ = flatten(params)
    check({path: w for path, w in leaves.items() if is_array(w)}, adapter)
    for site, method in adapter.sites:
        u, v = start_factors(adapter, site, method)
        own = {"a": u, "b": -v, "scale": jnp.ones(site.stack, u.dtype)}
        w = matrices(site, leaves[site.path])
        rest = merged(LoRA(rank=1), w, own, {}, len(site.stack))
        yield site.path, unfold(rest, site.kinds, site.shape).astype(site.dtype)


def start_factors(adapter: Adapter, site: Site, method: Method) -> tuple[Array, Array]:
    """The product that a site of an adapter has subtracted from its weight.

    Args:
      adapter: one adapter.
      site: one of its sites.
      method: of that site, `PiSSA` or a `Residual`.

    Returns:
      u [*stack, d_in, R], v [*stack, R, d_out].

    Raises:
      ValueError: another method.
    """
    check_residual(site, method)
    inner = method.method if isinstance(method, Residual) else LoRA(rank=1)

    def one(p: Arrays) -> tuple[Array, Array]:
        start = {k: p.get(f"{k}0", t) for k, t in p.items() if not (k[-1] == "0" and k[:-1] in p)}
        factors = inner.factors(inner.prepare(start))
        assert factors is not None
        return factors

    for _ in site.stack:
        one = jax.vmap(one)
    return one(adapter.arrays(site)[0])


def without_start(adapter: Adapter) -> Adapter:
    """The adapter of rank r that belongs to the weights of `residual_leaves`.

    Args:
      adapter: one adapter, of `PiSSA` or of a method in a `Residual`.

    Returns:
      The method inside, with its arrays.

    Raises:
      ValueError: another method.
    """
    rows = []
    for site, method in adapter.sites:
        check_residual(site, method)
        plain = method.method if isinstance(method, Residual) else _lora_of(site, method)
        rows.append((site, plain))
    frozen = {}
    for path, p in adapter.frozen.items():
        copies = {f"{name}0" for name in adapter.trainable[path]}
        frozen[path] = {name: t for name, t in p.items() if name not in copies}
    return adapter.replace(frozen=frozen, sites=tuple(rows))


def check_residual(site: Site, method: Method) -> None:
    """Raises ValueError for a method that carries no start.

    Args:
      site: named in the error.
      method: any.

    Raises:
      ValueError: it is neither `PiSSA` nor a `Residual`.
    """
    if not isinstance(method, PiSSA | Residual):
        raise ValueError(f"{site.path}: got the method {method}, expected PiSSA or Residual")


def _lora_of(site: Site, method: Method) -> LoRA:
    """The LoRA inside of a method that starts elsewhere."""
    if isinstance(method, PiSSA):
        return LoRA(rank=method.rank, alpha=method.alpha)
    if isinstance(method, Residual) and type(method.method) is LoRA:
        return method.method
    raise ValueError(f"{site.path}: got the method {method}, expected PiSSA or Residual(LoRA)"
                     "; jl.merging.to_lora makes LoRA of any method with factors")  # fmt: skip
