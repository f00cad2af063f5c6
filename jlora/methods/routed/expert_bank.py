r"""What methods with many low-rank experts share: fresh experts, experts from adapters, padding.

=========  ==========================================================================
A_e, B_e   `a` [E, d_in, r], `b` [E, r, d_out], one pair per expert
s_e        `scales` [E], the scale of each expert
=========  ==========================================================================

.. math:: \Delta_e = s_e A_e B_e

Adapters of smaller rank are padded with zeros, which changes no delta.

Reference: none (jlora).
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.site import Arrays, Site
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic


def new_experts(key: PRNGKeyArray, site: Site, experts: int, rank: int) -> Arrays:
    """Experts that change nothing yet.

    Args:
      key: of the random values.
      site: one matrix.
      experts: E.
      rank: r.

    Returns:
      a [E, d_in, r] uniform in ±1/sqrt(d_in), b [E, r, d_out] = 0.
    """
    bound, dtype = 1 / math.sqrt(site.d_in), site.param_dtype
    shape = (experts, site.d_in, rank)
    return {
        "a": jax.random.uniform(key, shape, dtype, -bound, bound),
        "b": jnp.zeros((experts, rank, site.d_out), dtype),
    }


def with_experts(adapter: Adapter, loras: Sequence[Adapter]) -> Adapter:
    """An adapter whose experts are adapters that were trained before.

    Args:
      adapter: of `MeteoRA`, `XLoRA` or `LoRAMixer`.
      loras: one adapter of LoRA per expert, in their order, on the same sites; ranks may differ up
        to the rank of the experts.

    Returns:
      The adapter with new a, b and scales; all else stays.

    Raises:
      ValueError: another number of adapters, a site that one of them lacks, another method or
        shape, a larger rank.
    """
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    for site, method in adapter.sites:
        own, _ = adapter.arrays(site)
        count, rank = getattr(method, "experts", 0), getattr(method, "rank", 0)
        if not isinstance(count, int) or "scales" not in own or count != len(loras):
            raise ValueError(
                f"{site.path}: got {len(loras)} adapters for {method}, expected one per expert"
            )
        parts = [_expert(lora, n, site, rank) for n, lora in enumerate(loras)]
        axis = len(site.stack)
        new = {name: jnp.stack([part[name] for part in parts], axis) for name in parts[0]}
        for name, array in new.items():
            if array.shape != own[name].shape:
                raise ValueError(
                    f"{site.path}: {name}: got {array.shape}, expected {own[name].shape}"
                )
        for part in (trainable, frozen):
            held = part.get(site.path, {})
            put = {k: new[k].astype(held[k].dtype) for k in new.keys() & held.keys()}
            part[site.path] = {**held, **put}
    return adapter.replace(trainable=trainable, frozen=frozen)


def _expert(lora: Adapter, number: int, site: Site, rank: int) -> Arrays:
    """The factors of one adapter at a site, padded to `rank`."""
    match = next(((s, m) for s, m in lora.sites if s.path == site.path), None)
    if match is None or not isinstance(match[1], LoRA):
        has = "nothing" if match is None else str(match[1])
        raise ValueError(f"adapter {number}: {site.path}: got {has}, expected LoRA")
    p, _ = lora.arrays(match[0])
    more = rank - p["a"].shape[-1]
    if more < 0:
        raise ValueError(
            f"adapter {number}: {site.path}: got rank {rank - more}, expected at most {rank}"
        )
    pad = [(0, 0)] * (p["a"].ndim - 2)
    return {
        "a": jnp.pad(p["a"], [*pad, (0, 0), (0, more)]),
        "b": jnp.pad(p["b"], [*pad, (0, more), (0, 0)]),
        "scales": p["scale"],
    }


def real_tokens(
    ctx: Mapping[str, Dynamic], logits: Float[Array, "*T E"]
) -> Bool[Array, "*T"] | None:
    """Which tokens are real, where the caller said so: `ctx["mask"]`.

    Args:
      ctx: of a site.
      logits: of its router.

    Returns:
      bool [*T]; None where there is no mask.

    Raises:
      ValueError: a mask of other tokens than the router's.
    """
    return _per_token(ctx, "mask", logits)


def token_labels(
    ctx: Mapping[str, Dynamic], logits: Float[Array, "*T E"]
) -> Int[Array, "*T"] | None:
    """The expert of each token, where the caller said so: `ctx["labels"]`.

    Args:
      ctx: of a site.
      logits: of its router.

    Returns:
      int [*T]; None where there are no labels.

    Raises:
      ValueError: labels of other tokens than the router's.
    """
    return _per_token(ctx, "labels", logits)


def _per_token(ctx: Mapping[str, Dynamic], name: str, logits: Array) -> Array | None:
    value = ctx.get(name)
    if value is not None and value.shape != logits.shape[:-1]:
        raise ValueError(
            f"ctx[{name!r}]: got {value.shape}, expected the router's tokens {logits.shape[:-1]}"
        )
    return value
