r"""A decoder of the Llama family in Flax Linen, its layers one ``nn.scan``.

Symbols: tokens :math:`i_t` = ``ids``, residual stream :math:`h`, norms N, attention A, gated
feed-forward F; :math:`N'` are Gemma's norms after a block, the identity elsewhere.

.. math::
    h^0_t = E_{i_t}, \qquad u = h^l + N'_1 A(N_1 h^l), \qquad h^{l+1} = u + N'_2 F(N_2 u)

    F(x) = D\,(\phi(G x) \odot U x), \qquad
    \operatorname{logits} = \operatorname{cap}(H\,N h^L)

Parameters are a plain dict; every leaf below ``layers`` has a leading axis L::

    embed_tokens  {embedding}
    layers        attention {query | key | value | out {kernel[, bias]}[, q_norm | k_norm {scale}]}
                  ffn       {gate | up | down {kernel[, bias]}}
                  input_layernorm | post_attention_layernorm {scale}
                  [pre_feedforward_layernorm | post_feedforward_layernorm {scale}]   (Gemma 2, 3)
    norm          {scale}
    [lm_head      {kernel}]                                                         (not tied)

`forward` is the model as a pure function of its parameters, for `jlora.lift`.

Reference: as `jlora.models.decoder.config`.
Deviates: no dropout.
"""

from typing import Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.models.decoder import attention, rope
from jlora.models.decoder.attention import Attend
from jlora.models.decoder.config import DecoderConfig
from jlora.types import Dynamic, Tree

Remat = Literal["none", "dots", "all"]
POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slot i holds position i of its row."""

    key: Array  # [L, b, slots, kv_heads, head_width], rotated
    value: Array  # the same shape


class Output(NamedTuple):
    """What `forward` returns."""

    logits: Array  # float32 [b, t, vocab], or [b, 1, vocab] with `last`
    cache: Cache | None  # the given cache with this call's tokens in it


class Shared(NamedTuple):
    """What all layers read: not scanned."""

    positions: Array  # int32 [b, t]
    angles: tuple[Array, Array]  # cosine and sine of layers with full attention
    local_angles: tuple[Array, Array]  # of local layers
    seen: Array  # bool [b, t, s]
    seen_locally: Array  # bool [b, t, s]


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """A cache without tokens.

    Args:
      config: the architecture.
      batch: rows.
      slots: tokens of a row at most.

    Returns:
      Zeros in ``config.dtype``.
    """
    shape = (config.layers, batch, slots, config.kv_heads, config.head_width)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


class Norm(nn.Module):
    """RMSNorm over the last axis, in float32, with parameter ``scale``."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        start = nn.initializers.zeros if c.unit_norms else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],)).astype(jnp.float32) + float(c.unit_norms)
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean + c.norm_eps) * scale).astype(x.dtype)


def _dense(config: DecoderConfig, features: int, bias: bool, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.init_std)
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, kernel_init=init, name=name)


def _write(slots: Array, new: Array, at: Array) -> Array:
    """One row's new keys or values from slot `at` on."""
    return jax.lax.dynamic_update_slice(slots, new, (at, 0, 0))


class Attention(nn.Module):
    """Projections, rotation, cache and `attend`."""

    config: DecoderConfig
    attend: Attend

    @nn.compact
    def __call__(
        self, x: Array, shared: Shared, local: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        c = self.config
        b, t, _ = x.shape
        project = lambda heads, name: _dense(  # noqa: E731
            c, heads * c.head_width, c.qkv_bias, name
        )(x).reshape(b, t, heads, c.head_width)
        q, k, v = (
            project(n, name)
            for n, name in ((c.heads, "query"), (c.kv_heads, "key"), (c.kv_heads, "value"))
        )
        if c.qk_norm:
            q, k = Norm(c, name="q_norm")(q), Norm(c, name="k_norm")(k)
        choose = lambda x, y: jnp.where(local, x, y) if any(c.local) else y  # noqa: E731
        cos, sin = jax.tree.map(choose, shared.local_angles, shared.angles)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if cache is not None:
            write = jax.vmap(
                lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0, 0))
            )
            start = shared.positions[:, 0]
            cache = Cache(write(cache.key, k, start), write(cache.value, v, start))
            k, v = cache
        mixed = self.attend(
            q, k, v, choose(shared.seen_locally, shared.seen),
            scale=c.query_scale or c.head_width**-0.5, cap=c.attention_cap,
        )  # fmt: skip
        return _dense(c, c.width, c.out_bias, "out")(mixed.reshape(b, t, -1)), cache


class FeedForward(nn.Module):
    """The gated block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate, up = (_dense(c, c.ffn, c.ffn_bias, name)(x) for name in ("gate", "up"))
        phi = jax.nn.silu if c.activation == "silu" else jax.nn.gelu  # gelu: the tanh form
        return _dense(c, c.width, c.ffn_bias, "down")(phi(gate) * up)


class Layer(nn.Module):
    """One step of the scan: ``(hidden, shared, local, cache) -> (hidden, cache)``."""

    config: DecoderConfig
    attend: Attend

    @nn.compact
    def __call__(
        self, x: Array, shared: Shared, local: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        c = self.config
        norm = lambda name: Norm(c, name=name)  # noqa: E731
        inner, cache = Attention(c, self.attend, name="attention")(
            norm("input_layernorm")(x), shared, local, cache
        )
        if c.post_norms:
            x = x + norm("post_attention_layernorm")(inner)
            inner = FeedForward(c, name="ffn")(norm("pre_feedforward_layernorm")(x))
            return x + norm("post_feedforward_layernorm")(inner), cache
        x = x + inner
        return x + FeedForward(c, name="ffn")(norm("post_attention_layernorm")(x)), cache


class Decoder(nn.Module):
    """Tokens to logits: ``Decoder(config).apply({"params": p}, ids)``; arguments of `forward`."""

    config: DecoderConfig
    attend: Attend = attention.attend
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        ids: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        last: Array | None = None,
    ) -> Output:
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
        for name, given in (("positions", positions), ("segments", segments)):
            if given is not None and given.shape != ids.shape:
                raise ValueError(f"{name}: got shape {given.shape}, expected {ids.shape}")
        if cache is not None and segments is not None:
            raise ValueError(
                "segments: got packed rows with a cache, expected one document per row"
            )
        init = nn.initializers.normal(c.init_std)
        table = nn.Embed(c.vocab, c.width, dtype=c.dtype, embedding_init=init, name="embed_tokens")
        x = table(ids)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=POLICIES[self.remat], prevent_cse=False)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Dynamic, (nn.broadcast, 0, 0)),
            length=c.layers,
        )(c, self.attend, name="layers")
        local = jnp.asarray(c.local or (False,) * c.layers)
        x, cache = stack(x, _shared(c, positions, segments, cache), local, cache)
        x = Norm(c, name="norm")(x)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        head = _dense(c, c.vocab, False, "lm_head")
        logits = table.attend(x) if c.tied else head(x)
        return Output(attention.soft_cap(logits.astype(jnp.float32), c.logit_cap), cache)


def _shared(
    c: DecoderConfig, positions: Array, segments: Array | None, cache: Cache | None
) -> Shared:
    keys = positions
    if cache is not None:
        slots = jnp.arange(cache.key.shape[2], dtype=positions.dtype)
        keys = jnp.broadcast_to(slots[None], (positions.shape[0], slots.size))
    seen = attention.visible(positions, keys, segments, segments)
    angles = rope.angles(c.rope, c.head_width, positions)
    if not any(c.local):
        return Shared(positions, angles, angles, seen, seen)
    near = attention.visible(positions, keys, segments, segments, c.window)
    local = rope.angles(c.local_rope or c.rope, c.head_width, positions)
    return Shared(positions, angles, local, seen, near)


def forward(
    params: dict[str, Tree],
    ids: Int[Array, "b t"],
    positions: Int[Array, "b t"] | None = None,
    segments: Int[Array, "b t"] | None = None,
    cache: Cache | None = None,
    last: Int[Array, "b"] | None = None,
    *,
    config: DecoderConfig,
    attend: Attend = attention.attend,
    remat: Remat = "none",
) -> Output:
    """The decoder as a pure function of its parameters.

    Args:
      params: the tree described above.
      ids: tokens; rows of different length are padded on the right with any token.
      positions: of the tokens, from 0 in each document; None: 0 .. t-1. With a cache, those of a
        row follow each other and stay below the number of slots.
      segments: the document of each token in packed rows; None: one document per row.
      cache: keys and values of earlier tokens; this call's are written at `positions`.
      last: per row, the index of the only token whose logits are wanted; None: all.
      config: the architecture.
      attend: the attention function.
      remat: what the backward pass computes again: nothing, all but matmuls ("dots"), everything.

    Returns:
      Logits, float32, and the new cache.

    Raises:
      ValueError: positions or segments of another shape than `ids`, or segments with a cache.
    """
    model = Decoder(config, attend, remat)
    return cast(Output, model.apply({"params": params}, ids, positions, segments, cache, last))


def init(key: PRNGKeyArray, config: DecoderConfig) -> dict[str, Tree]:
    """Fresh parameters.

    Args:
      key: of the normal values.
      config: the architecture.

    Returns:
      The tree described above, float32.
    """
    ids = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(lambda k: Decoder(config).init(k, ids)["params"])(key)


def loss(
    logits: Float[Array, "b t vocab"], ids: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each next token, in nats.

    Args:
      logits: of `forward`.
      ids: the tokens themselves.
      weights: per token, how much its own prediction counts: 0 for prompts, padding and the first
        token of a document. A batch without any weight has loss 0.

    Returns:
      A scalar.
    """
    picked = jnp.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked
    total = jnp.sum(weights[:, 1:])
    return jnp.sum(losses * weights[:, 1:]) / jnp.where(total > 0, total, 1.0)
