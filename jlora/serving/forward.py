r"""A decoder whose keys and values lie in the pages of adapters, for rows of different length.

=====  ====================================================================================
b, t   rows of a batch, and new tokens of a row: 1 where answers grow, a prompt's at its start
S      tokens of a row that the program sees, a power of 2
L      layers; a page is [kv_heads, 2, L, head_width], keys before values
=====  ====================================================================================

.. math::
    (\ell, K', V') = f(W + \Delta_{n(row)};\ i_{s \dots s+t-1} \mid K_{<s}, V_{<s})

Pages of earlier tokens are gathered to a contiguous cache, the decoder runs as it does anywhere
else, and the keys and values of the new tokens are scattered to their own pages. Slots of the cache
that hold no token yet read page 0, zeros: what a page held before is never seen.

Reference: Kwon et al. 2023, arXiv:2309.06180 (paged attention); Sheng et al. 2023,
    arXiv:2311.03285 (S-LoRA).
Deviates: attention reads a gathered copy instead of the pages themselves.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.site import Site
from jlora.core.sites import sites
from jlora.models import decoder
from jlora.models.layers import MASKED
from jlora.serving import components
from jlora.serving.parallel import Layout
from jlora.types import Dynamic, Tree


class Batch(NamedTuple):
    """What a step reads of its rows; rows and tokens that fill a bucket write to page P."""

    adapter: Int[Array, "b"]  # number in the bank, `components.BASE` for the base
    ids: Int[Array, "b t"]  # new tokens
    start: Int[Array, "b"]  # position of the first one
    last: Int[Array, "b"]  # index of the last one, whose logits are wanted
    table: Int[Array, "b S"]  # pages of earlier tokens, 0 where there is none
    write: Int[Array, "b t"]  # pages of the new ones


class Step(NamedTuple):
    """What a step gives back."""

    data: Float[Array, "P W"]  # the pool with the new keys and values
    logits: Float[Array, "b vocab"]  # of the next token
    best: Int[Array, "b"]  # their maximum


def width(config: decoder.DecoderConfig) -> int:
    """Numbers of a page.

    Args:
      config: the architecture.

    Returns:
      W, keys and values of one token at all layers.
    """
    return 2 * config.layers * config.kv_heads * config.head_width


def adaptable(config: decoder.DecoderConfig, params: Tree, pattern: str) -> tuple[Site, ...]:
    """The weights that served adapters may change.

    Args:
      config: the architecture.
      params: its parameters, or their shapes.
      pattern: regex of paths; fewer sites make smaller components.

    Returns:
      Their sites.

    Raises:
      ValueError: no path matches.
    """
    run = functools.partial(decoder.forward, config=config)
    table = sites(run, params, jnp.zeros((1, 2), jnp.int32))
    return tuple(s for s, _ in table.select({pattern: components.Components()}))


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=1)
def step(
    config: decoder.DecoderConfig,
    data: Float[Array, "P W"],
    params: Tree,
    bank: Adapter | None,
    batch: Batch,
    layout: Layout | None = None,
) -> Step:
    """Logits of the next tokens, and the pool with the keys and values of those given.

    Args:
      config: the architecture.
      data: the pool; its memory is used for the new one.
      params: weights of the base.
      bank: components of the adapters of the batch; None: the base alone, for all rows.
      batch: the rows.
      layout: of pool, weights and bank on several devices; None: one device.

    Returns:
      Pool and logits.
    """
    run = functools.partial(decoder.forward, config=config)
    tuned: Callable[..., Dynamic] = run if bank is None else lift(run)
    b, t = batch.ids.shape
    page = (config.kv_heads, 2, config.layers, config.head_width)
    old = data[batch.table].reshape(b, -1, *page).astype(config.dtype)
    old = jnp.transpose(old, (0, 3, 4, 1, 2, 5))  # [b, 2, L, S, kv, width]

    def one(adapter: Array, ids: Array, start: Array, last: Array, old: Array) -> Dynamic:
        positions = start + jnp.arange(t, dtype=jnp.int32)
        cache = decoder.Cache(old[0][:, None], old[1][:, None])
        own = () if bank is None else (components.for_row(bank, adapter),)
        out = tuned(params, *own, ids[None], positions[None], None, cache, last[None])
        new = jnp.stack([out.cache.key[:, 0], out.cache.value[:, 0]])
        new = jax.lax.dynamic_slice_in_dim(new, start, t, axis=2)
        return out.logits[0, 0], jnp.transpose(new, (2, 3, 0, 1, 4)).reshape(t, -1)

    logits, new = jax.vmap(one)(batch.adapter, batch.ids, batch.start, batch.last, old)
    data = data.at[batch.write.reshape(-1)].set(
        new.reshape(b * t, -1).astype(data.dtype), mode="drop"
    )
    data = data if layout is None else layout.pages(data)
    return Step(data, logits, jnp.argmax(logits, axis=-1).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; as `decoder.Sampler`, but no program of its own."""

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        decoder.Sampler(self.temperature, 0, self.top_p)


@jax.jit
def draw(
    key: PRNGKeyArray,
    logits: Float[Array, "vocab"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    """A token at a temperature above 0, from the likeliest tokens whose mass reaches top_p.

    Args:
      key: of the draw.
      logits: of the next token.
      temperature: divides them.
      top_p: the mass; 1: all tokens.

    Returns:
      Its number.
    """
    logits = logits / temperature
    order = jnp.argsort(-logits)
    mass = jax.nn.softmax(logits[order])
    kept = (jnp.cumsum(mass) - mass < top_p) | (top_p >= 1)
    chosen = jax.random.categorical(key, jnp.where(kept, logits[order], MASKED))
    return order[chosen].astype(jnp.int32)
