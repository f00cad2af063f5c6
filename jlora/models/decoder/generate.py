r"""Text from a decoder: one jitted loop over a cache, for rows of different length.

The prompt fills the cache in one pass; then every row continues at its own length, one token per
step, until all rows have ended.

.. math::
    p_i \propto \exp(\ell_i / \tau)\,[\ell_i \ge \ell_{(k)}]\,
    \left[\sum_{j: p_j > p_i} p_j < P\right]

Symbols: logits :math:`\ell`, temperature :math:`\tau`, the k-th largest logit :math:`\ell_{(k)}`,
probability mass P. Temperature 0 is greedy. As in transformers, temperature comes first, then
top-k, then top-p.

Reference: Fan et al. 2018 (arXiv:1805.04833) for top-k; Holtzman et al. 2019 (arXiv:1904.09751) for
    top-p.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.models.decoder.config import DecoderConfig
from jlora.models.decoder.model import Cache, Output, empty_cache
from jlora.models.layers import MASKED
from jlora.types import Tree


class Forward(Protocol):
    """`jlora.models.decoder.forward` of a config, or its lifted form with the adapter filled in."""

    def __call__(
        self, params: Tree, ids: Array, positions: Array, segments: None, cache: Cache, last: Array
    ) -> Output: ...


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0: the most likely token.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens whose mass reaches p; 1: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, expected a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k: got {self.top_k}, expected >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected 0 < top_p <= 1")


class Generated(NamedTuple):
    """What `generate` returns."""

    ids: Array  # int32 [b, t + steps]: prompt, new tokens, then `pad`
    lengths: Array  # int32 [b]: tokens of each row, the end token included


def sample(key: PRNGKeyArray, logits: Float[Array, "b vocab"], sampler: Sampler) -> Int[Array, "b"]:
    """One token per row.

    Args:
      key: of the draw; greedy decoding does not read it.
      logits: of the next token, float32.
      sampler: temperature, top-k and top-p.

    Returns:
      Numbers of tokens, int32.
    """
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, MASKED)
    if sampler.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        mass = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass  # of likelier tokens; 0 for the first
        kept = jnp.take_along_axis(before < sampler.top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, MASKED)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate(
    forward: Forward,
    params: Tree,
    prompts: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    key: PRNGKeyArray,
    *,
    config: DecoderConfig,
    steps: int,
    sampler: Sampler = Sampler(),
    end: tuple[int, ...] = (),
    pad: int = 0,
) -> Generated:
    """Continues every prompt by at most `steps` tokens. Meant to be jitted as a whole.

    Args:
      forward: the model, ``functools.partial(decoder.forward, config=config)`` or its lifted form.
      params: its parameters.
      prompts: tokens, padded on the right.
      lengths: tokens of each prompt, from 1 to t.
      key: of the draws; each row of each step has its own.
      config: the architecture, for the cache.
      steps: new tokens at most; the cache has ``t + steps`` slots.
      sampler: how tokens are drawn.
      end: tokens that end a row.
      pad: what stands behind the end of a row.

    Returns:
      Tokens and lengths. A row that ended goes on being computed, and its tokens are `pad`.

    Raises:
      ValueError: `steps` below 1, prompts that are no int32 matrix, or `lengths` of another shape.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected >= 1")
    if prompts.ndim != 2 or prompts.dtype != jnp.int32:
        raise ValueError(f"prompts: got {prompts.dtype}{prompts.shape}, expected int32[b, t]")
    b, t = prompts.shape
    if lengths.shape != (b,):
        raise ValueError(f"lengths: got shape {lengths.shape}, expected {(b,)}")
    place = jnp.arange(t + steps, dtype=jnp.int32)[None]
    ids = jnp.pad(prompts, ((0, 0), (0, steps)))
    ids = jnp.where(place < lengths[:, None], ids, jnp.int32(pad))
    positions = jnp.broadcast_to(place[:, :t], (b, t))
    cache = empty_cache(config, b, t + steps)
    first = forward(params, prompts, positions, None, cache, lengths - 1)
    ends = jnp.asarray(end, jnp.int32)

    def append(state, out, step):
        ids, lengths, done, _ = state
        token = sample(jax.random.fold_in(key, step), out.logits[:, 0], sampler)
        token = jnp.where(done, jnp.int32(pad), token)
        here = (place == lengths[:, None]) & ~done[:, None]
        ids = jnp.where(here, token[:, None], ids)
        lengths = lengths + (~done).astype(jnp.int32)
        done |= jnp.any(token[:, None] == ends[None], axis=-1)
        return ids, lengths, done, out.cache

    def advance(carry):
        step, state = carry
        ids, lengths, _, cache = state
        at = lengths - 1  # the newest token; of a row that ended, its last one once more
        token = jnp.take_along_axis(ids, at[:, None], axis=1)
        out = forward(params, token, at[:, None], None, cache, jnp.zeros((b,), jnp.int32))
        return step + 1, append(state, out, step)

    state = append((ids, lengths, jnp.zeros((b,), bool), cache), first, 0)
    going = lambda carry: (carry[0] < steps) & ~jnp.all(carry[1][2])  # noqa: E731
    _, (ids, lengths, _, _) = jax.lax.while_loop(going, advance, (jnp.int32(1), state))
    return Generated(ids, lengths)
