r"""DyLoRA: one training for every rank; each step trains the first b ranks, b drawn at random.

=========  =====================================================================================
A, B, s    the factors of a site, [d_in, R] and [R, d_out], and its scale, alpha / R
b          rank of a step, drawn from low..high
p          probability of each b; uniform unless given
=========  =====================================================================================

.. math:: b \sim p, \qquad W' = W + \tfrac{\alpha}{b} \, A_{:, :b} \, B_{:b, :}
          = W + s \, \tfrac{R}{b} \, A_{:, :b} \, B_{:b, :}

Ranks are so ordered by importance, and truncation to any b gives an adapter that was trained as
such: no search over ranks, no training for each. In the *frozen* mode a step trains rank b alone,
those before it enter the forward pass as constants:

.. math:: \nabla_{A_{:, k}} = 0, \; \nabla_{B_{k, :}} = 0 \quad (k \ne b)

A step is ``b = sample(key, low, high)`` and the gradient of
``loss(truncate(adapter.replace(trainable=t), b))`` with respect to t. Adam moves ranks of gradient
zero by their momentum; for an update of exactly those that were trained, chain
`jlora.schedules.ranks.masked_updates` last and pass ``masks=trained(adapter, b)``.

Paper: Valipour et al. 2023, arXiv:2210.07558.
Source: paper and official code: factors times sqrt(R / b) each, at scale alpha / R.
Deviates: with rsLoRA the scale is alpha / sqrt(b).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Int, Key

from jlora.contracts.schedule import Schedule
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.lora import LoRA
from jlora.schedules import ranks
from jlora.types import Dynamic, Tree


def sample(
    key: Key[jax.Array, ""], low: int, high: int, probabilities: Sequence[float] | None = None
) -> Int[jax.Array, ""]:
    """The rank of a step.

    Args:
      key: of the draw; one per step, such as `jax.random.fold_in(key, step)`.
      low: the smallest rank, at least 1.
      high: the largest rank.
      probabilities: of low..high; None: all alike, as the paper's experiments have it.

    Returns:
      int32 [], in low..high.

    Raises:
      ValueError: low < 1 or high < low; probabilities of another number, negative, or all zero.
    """
    if not 1 <= low <= high:
        raise ValueError(f"sample: got low {low}, high {high}, expected 1 <= low <= high")
    if probabilities is None:
        return jax.random.randint(key, (), low, high + 1)
    if len(probabilities) != high - low + 1 or min(probabilities) < 0 or not sum(probabilities) > 0:
        raise ValueError(
            f"probabilities: got {list(probabilities)}, expected {high - low + 1} numbers >= 0"
        )
    weights = jnp.asarray(probabilities, jnp.float32)
    return low + jax.random.choice(key, high - low + 1, p=weights / weights.sum()).astype(jnp.int32)


def first(adapter: Adapter, rank: Dynamic) -> dict[str, jax.Array]:
    """Masks that keep the first ranks.

    Args:
      adapter: for the shapes.
      rank: [] int, how many; may be traced.

    Returns:
      {path: [*stack, R] bool}.
    """
    whole = ranks.full(adapter)
    return {p: jnp.broadcast_to(jnp.arange(m.shape[-1]) < rank, m.shape) for p, m in whole.items()}


def trained(adapter: Adapter, rank: Dynamic, frozen: bool = False) -> dict[str, jax.Array]:
    """Masks of the ranks that a step trains.

    Args:
      adapter: for the shapes.
      rank: [] int, that of the step; may be traced.
      frozen: whether it trains its last rank alone.

    Returns:
      {path: [*stack, R] bool}.
    """
    masks = first(adapter, rank)
    if not frozen:
        return masks
    return {p: m & (jnp.arange(m.shape[-1]) == rank - 1) for p, m in masks.items()}


def truncate(adapter: Adapter, rank: Dynamic, frozen: bool = False) -> Adapter:
    """The adapter at a lower rank, in arrays of the same shapes.

    Args:
      adapter: LoRA at every site.
      rank: [] int, b; may be traced.
      frozen: whether gradients reach rank b alone.

    Returns:
      An adapter with zeros beyond b and the scale of rank b. `cut` makes its arrays small.

    Raises:
      ValueError: a site of another method than LoRA; a rank outside of 1..R that is a number.
    """
    if frozen:
        masks = trained(adapter, rank, frozen=True)
        adapter = adapter.replace(trainable={
            s.path: {n: jnp.where(ranks.along(masks[s.path], t, m.rank_axes[n]), t,
                                  jax.lax.stop_gradient(t))
                     for n, t in adapter.trainable[s.path].items()}
            for s, m in adapter.sites
        })  # fmt: skip
    scales = {}
    for site, method in adapter.sites:
        if not isinstance(method, LoRA):
            raise ValueError(f"{site.path}: got {method}, expected LoRA")
        if isinstance(rank, int) and not 1 <= rank <= method.rank:
            raise ValueError(f"{site.path}: rank: got {rank}, expected in 1..{method.rank}")
        own = adapter.frozen[site.path]
        ratio = method.rank / jnp.asarray(rank, own["scale"].dtype)
        ratio = jnp.sqrt(ratio) if method.rslora else ratio
        scales[site.path] = {**own, "scale": own["scale"] * ratio}
    small = ranks.zeroed(adapter, first(adapter, rank))
    return small.replace(frozen={**adapter.frozen, **scales})


def cut(adapter: Adapter, state: Tree, rank: int) -> tuple[Adapter, Dynamic]:
    """The adapter and the optimizer's state at a lower rank, in smaller arrays.

    Args:
      adapter: LoRA at every site.
      state: of an optax optimizer of its trainable; () for none.
      rank: b.

    Returns:
      LoRA of rank b with the alpha of before, and the state.

    Raises:
      ValueError: as of `truncate`.
    """
    alone = truncate(adapter, rank)
    whole = adapter.replace(frozen=alone.frozen)
    small, state = ranks.shrink(whole, state, first(adapter, rank))
    alphas = {site.path: method.alpha for site, method in adapter.sites}  # type: ignore[attr-defined]
    rows = tuple(
        (site, dataclasses.replace(method, alpha=alphas[site.path]))  # type: ignore[type-var]
        for site, method in small.sites
    )
    return small.replace(sites=rows), state


# The record: ranks 1..3 of 4 at random for three steps, then truncated to 2.
_LENGTH, _HIGH, _TARGET = 3, 3, 2


def _start(adapter: Adapter) -> dict[str, Dynamic]:
    return {"key": jax.random.key_data(jax.random.key(0)), "whole": ranks.full(adapter)}


def _masks(state: Tree, step: Dynamic) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), step)  # type: ignore[index]
    rank = jnp.where(step >= _LENGTH, _TARGET, sample(key, 1, _HIGH))
    return {p: jnp.broadcast_to(jnp.arange(m.shape[-1]) < rank, m.shape)
            for p, m in state["whole"].items()}  # type: ignore[index]  # fmt: skip


def _rank(masks: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(next(iter(masks.values())), dtype=jnp.int32)


SYSTEM = Schedule(
    name="DyLoRA",
    paper="Valipour 2023, 2210.07558",
    symbol="truncate",
    claim="dylora",
    evidence="value, gradients and frozen mode by numpy; truncation is the forward of training",
    rows=(35,),
    examples=(LoRA(rank=4, alpha=2.0), LoRA(rank=4, rslora=True)),
    start=_start,
    masks=_masks,
    mask=lambda adapter, masks: truncate(adapter, _rank(masks)),
    shrink=lambda adapter, state, masks: cut(adapter, state, int(_rank(masks))),
    budget=lambda adapter, step: len(adapter.sites) * (_TARGET if step >= _LENGTH else _HIGH),
    length=_LENGTH,
)
