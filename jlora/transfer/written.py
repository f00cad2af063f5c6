r"""Texts that a decoder writes after a few examples, many at once after one prompt.

=========  ====================================================================================
p          the prompt, examples one after the other, t tokens
N          texts that are written after it
=========  ====================================================================================

.. math:: x^{(n)} \sim M(\,\cdot \mid p), \qquad n = 1..N

All texts share the prompt, so its pass through the decoder is made for one row and its cache is
repeated: the cost of a prompt of t tokens is t instead of N t.

Reference: Wang et al. 2024, arXiv:2405.17258.
Deviates: the paper's target writes; here any decoder of `jlora.models.decoder` does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jlora.models.decoder.config import DecoderConfig
from jlora.models.decoder.generate import Forward, Generated, Sampler, generate
from jlora.models.decoder.model import Cache, Output
from jlora.types import Tree

FREE = Sampler(temperature=1.0)  # texts have to differ


def shared_prompt(forward: Forward) -> Forward:
    """A decoder whose pass over several tokens is that of the first row, for all rows.

    Args:
      forward: the decoder.

    Returns:
      The same for single tokens; several tokens have to be equal in all rows.
    """

    def run(
        params: Tree, ids: Array, positions: Array, segments: None, cache: Cache, last: Array
    ) -> Output:
        if ids.shape[1] == 1:
            return forward(params, ids, positions, segments, cache, last)
        first = jax.tree.map(lambda x: x[:, :1], cache)
        out = forward(params, ids[:1], positions[:1], segments, first, last[:1])
        rows = ids.shape[0]
        logits = jnp.repeat(out.logits, rows, axis=0)
        return Output(logits, jax.tree.map(lambda x: jnp.repeat(x, rows, axis=1), out.cache))

    return run


def write(
    forward: Forward,
    params: Tree,
    prompt: Int[Array, "t"],
    length: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    config: DecoderConfig,
    count: int,
    steps: int,
    sampler: Sampler = FREE,
    end: tuple[int, ...] = (),
    pad: int = 0,
) -> Generated:
    """Writes N texts after one prompt. Meant to be jitted as a whole.

    Args:
      forward: ``functools.partial(decoder.forward, config=config)`` or its lifted form.
      params: of the decoder.
      prompt: tokens, padded on the right, so that prompts of other lengths are not compiled anew.
      length: tokens of the prompt.
      key: of the draws; each row has its own.
      config: the architecture, for the cache.
      count: N.
      steps: new tokens of a text at most.
      sampler: how tokens are drawn; `FREE`: from the decoder's own distribution.
      end: tokens that end a text, as that of a line.
      pad: what stands behind the end of a row.

    Returns:
      Tokens [N, t + steps], the prompt first, and lengths.

    Raises:
      ValueError: no texts, a prompt that is no int32 vector, or what `generate` refuses.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected >= 1")
    if prompt.ndim != 1 or prompt.dtype != jnp.int32:
        raise ValueError(f"prompt: got {prompt.dtype}{prompt.shape}, expected int32[t]")
    rows = jnp.broadcast_to(prompt[None], (count, prompt.shape[0]))
    lengths = jnp.broadcast_to(jnp.asarray(length, jnp.int32), (count,))
    return generate(
        shared_prompt(forward), params, rows, lengths, key,
        config=config, steps=steps, sampler=sampler, end=end, pad=pad,
    )  # fmt: skip
