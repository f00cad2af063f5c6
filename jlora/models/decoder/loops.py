r"""One block of decoder layers that runs several times, with an output after every run.

===========  ==================================================================================
K, J         layers of the block, and how often it runs; a depth j is one run, 0 <= j < J
f_{j}        the block with the norms and the LoRA factors of depth j
===========  ==================================================================================

.. math::
    h^{j+1} = f_j(h^j), \qquad \ell^j = H\,N h^{j+1}, \qquad j = 0 \dots J - 1

All outputs :math:`\ell^j` come from the one head H and the last norm N. The parameters are those of
`jlora.pruning.recursive.tied`: kernels have K layers on their first axis, leaves that every layer
keeps have J K. The factors are a bank of J adapters (`jlora.pruning.recursive.by_depth`), of which
a run reads one; so the depth may be traced, and differ between the rows of a `jax.vmap`.

Reference: Bae et al. 2024, arXiv:2410.20672.
"""

from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.models.decoder import attention, rope
from jlora.models.decoder.config import DecoderConfig
from jlora.models.decoder.model import Cache, Layer, Norm, Shared
from jlora.types import Dynamic, Tree


class Run(NamedTuple):
    """What one run of the block gives."""

    hidden: Array  # [b, t, width]
    cache: Cache | None  # of the K layers at this depth, with the given tokens in it


class Block(nn.Module):
    """The K layers: `Decoder` without embeddings, last norm and head."""

    config: DecoderConfig
    layers: int

    @nn.compact
    def __call__(
        self, x: Array, shared: Shared, local: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Dynamic, (nn.broadcast, 0, 0)),
            length=self.layers,
        )(self.config, attention.attend, name="layers")
        return stack(x, shared, local, cache)


def block_size(params: Tree, config: DecoderConfig) -> int:
    """K, read from the query kernels.

    Args:
      params: of `jlora.pruning.recursive.tied`.
      config: the architecture, of all J K layers.

    Returns:
      Layers of the block.

    Raises:
      ValueError: it does not divide the number of layers.
    """
    size = params["layers"]["attention"]["query"]["kernel"].shape[0]
    if config.layers % size:
        raise ValueError(
            f"layers/attention/query/kernel: got {size} layers, expected a divisor of"
            f" {config.layers}"
        )
    return size


def embedded(params: Tree, ids: Int[Array, "b t"], config: DecoderConfig) -> Float[Array, "b t d"]:
    """The residual stream before the first run.

    Args:
      params: with ``embed_tokens``.
      ids: tokens.
      config: the architecture.

    Returns:
      h^0 in ``config.dtype``.
    """
    table = nn.Embed(config.vocab, config.width, dtype=jnp.dtype(config.dtype))
    x = cast(Array, table.apply({"params": params["embed_tokens"]}, ids))
    return x * jnp.asarray(config.width**0.5, x.dtype) if config.scale_embeddings else x


def logits_of(
    params: Tree, hidden: Float[Array, "b t d"], config: DecoderConfig
) -> Float[Array, "b t vocab"]:
    """The output that the shared head gives after any run.

    Args:
      params: with ``norm``, and ``embed_tokens`` or ``lm_head``.
      hidden: h^{j+1}.
      config: the architecture.

    Returns:
      Logits, float32.
    """
    x = Norm(config).apply({"params": params["norm"]}, hidden)
    if config.tied:
        table = nn.Embed(config.vocab, config.width, dtype=jnp.dtype(config.dtype))
        out = table.apply({"params": params["embed_tokens"]}, x, method="attend")
    else:
        head = nn.Dense(config.vocab, use_bias=False, dtype=jnp.dtype(config.dtype))
        out = head.apply({"params": params["lm_head"]}, x)
    return attention.soft_cap(cast(Array, out).astype(jnp.float32), config.logit_cap)


def run_block(
    params: Tree,
    bank: Adapter | None,
    depth: Int[Array, ""],
    hidden: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    segments: Int[Array, "b t"] | None = None,
    cache: Cache | None = None,
    *,
    config: DecoderConfig,
) -> Run:
    """One run of the block for rows of one depth.

    Args:
      params: of `jlora.pruning.recursive.tied`; only ``layers`` is read.
      bank: J adapters of the block; None: tied layers without LoRA.
      depth: j, which may be traced.
      hidden: h^j.
      positions: of the tokens.
      segments: documents of packed rows; None: one per row. Not with a cache.
      cache: keys and values [K, b, slots, ...] of earlier tokens at this depth.
      config: the architecture, of all J K layers.

    Returns:
      h^{j+1} and the cache.

    Raises:
      ValueError: the block's size does not divide the number of layers, or a bank of another size.
    """
    size = block_size(params, config)
    loops = config.layers // size
    if bank is not None and bank.bank_shape != (loops,):
        raise ValueError(f"bank: got shape {bank.bank_shape}, expected ({loops},), one per depth")
    own = lambda w: w if w.shape[0] == size else w.reshape(loops, size, *w.shape[1:])[depth]  # noqa: E731
    layers = {"layers": jax.tree.map(own, params["layers"])}
    local = jnp.asarray(config.local or (False,) * config.layers).reshape(loops, size)[depth]
    keys = positions
    if cache is not None:
        slots = jnp.arange(cache.key.shape[2], dtype=positions.dtype)
        keys = jnp.broadcast_to(slots[None], (positions.shape[0], slots.size))
    seen = attention.visible(positions, keys, segments, segments)
    near = attention.visible(positions, keys, segments, segments, config.window)
    angles = rope.angles(config.rope, config.head_width, positions)
    close = rope.angles(config.local_rope or config.rope, config.head_width, positions)
    shared = Shared(positions, angles, close, seen, near)

    def f(layers: Tree, hidden: Array, shared: Shared, local: Array, cache: Cache | None):
        return Block(config, size).apply({"params": layers}, hidden, shared, local, cache)

    adapter = None if bank is None else bank[depth]
    return Run(*lift(f)(layers, adapter, hidden, shared, local, cache))


def exits(
    params: Tree,
    bank: Adapter | None,
    ids: Int[Array, "b t"],
    positions: Int[Array, "b t"] | None = None,
    segments: Int[Array, "b t"] | None = None,
    *,
    config: DecoderConfig,
) -> Float[Array, "loops b t vocab"]:
    """The outputs after every run, as early exits are trained and measured.

    Args:
      params: of `jlora.pruning.recursive.tied`.
      bank: J adapters of the block; None: tied layers without LoRA.
      ids: tokens; rows of different length are padded on the right.
      positions: from 0 in each document; None: 0 .. t-1.
      segments: the document of each token in packed rows; None: one document per row.
      config: the architecture, of all J K layers.

    Returns:
      Logits, float32; the last ones are those of the whole model.

    Raises:
      ValueError: as `run_block`.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)

    def one(hidden: Array, depth: Array) -> tuple[Array, Array]:
        out = run_block(params, bank, depth, hidden, positions, segments, config=config).hidden
        return out, logits_of(params, out, config)

    loops = config.layers // block_size(params, config)
    return jax.lax.scan(one, embedded(params, ids, config), jnp.arange(loops))[1]
