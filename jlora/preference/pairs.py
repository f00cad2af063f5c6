r"""Log-probabilities of pairs of answers, by a model with its adapter on or off.

==========  ==========================================================================
y           tokens of prompt and answer, [T]
m           1 where a token belongs to the answer, 0 for prompt and padding, [T]
p           the next-token distribution of a causal model
==========  ==========================================================================

.. math:: \log \pi(y) = \sum_{t=1}^{T-1} m_{t} \, \log p(y_{t} \mid y_{<t})

The first token has no prediction and never counts.

Paper: Rafailov et al. 2023, arXiv:2305.18290 (the reference is the model before training).
Deviates: the reference is the base with no adapter: no second copy of the weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.contracts.preference import LogProbs, Scorer
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.site import at_least_float32
from jlora.system import System
from jlora.types import Batch, Tree


class Pairs(NamedTuple):
    """Pairs of answers to the same prompts, padded to one length."""

    chosen: Int[Array, "B T"]  # tokens of prompt and answer
    rejected: Int[Array, "B T"]
    chosen_mask: Float[Array, "B T"]  # 1 where a token belongs to the answer
    rejected_mask: Float[Array, "B T"]


def sequence_log_probs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B"]:
    """The log-probability of every answer.

    Args:
      logits: of a causal model; those at position t predict token t + 1.
      tokens: of prompt and answer.
      mask: 1 where a token belongs to the answer.

    Returns:
      [B], at least float32.
    """
    logits = logits[:, :-1].astype(at_least_float32(logits.dtype))
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return jnp.sum(log_probs[..., 0] * mask[:, 1:].astype(log_probs.dtype), axis=-1)


def scorer(model: Callable[[Tree, Int[Array, "B T"]], Float[Array, "B T V"]]) -> Scorer:
    """``log_probs(params, adapter, pairs)`` of a causal language model.

    Args:
      model: (params, tokens [B, T]) -> logits [B, T, V].

    Returns:
      A function that runs chosen and rejected answers in one pass; `None` for the adapter is the
      base.
    """
    tuned = lift(model)

    def log_probs(params: Tree, adapter: Adapter | None, pairs: Pairs) -> LogProbs:
        tokens = jnp.concatenate([pairs.chosen, pairs.rejected])
        mask = jnp.concatenate([pairs.chosen_mask, pairs.rejected_mask])
        sums = sequence_log_probs(tuned(params, adapter, tokens), tokens, mask)
        lengths = jnp.sum(mask[:, 1:], axis=-1).astype(sums.dtype)
        return LogProbs(*jnp.split(sums, 2), *jnp.split(lengths, 2))

    return log_probs


def against_base(
    loss: Callable[[LogProbs, LogProbs], Float[Array, "B"]],
) -> Callable[[Scorer, Tree, Adapter, Batch], Float[Array, "B"]]:
    """The objective of a loss that compares the adapted model with the base.

    Args:
      loss: (log-probabilities of the adapted model, of the base) -> [B].

    Returns:
      objective(log_probs, params, adapter, batch) -> [B]. The base takes no gradient.
    """

    def objective(log_probs: Scorer, params: Tree, adapter: Adapter, batch: Batch) -> Array:
        base = jax.lax.stop_gradient(log_probs(params, None, batch))
        return loss(log_probs(params, adapter, batch), base)

    return objective


def margin(policy: LogProbs, reference: LogProbs) -> Float[Array, "B"]:
    """How much more the policy prefers the chosen answer than the reference does.

    Args:
      policy: of the adapted model.
      reference: of the base.

    Returns:
      h, [B].
    """
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


SYSTEM = System(
    name="Pairs of answers",
    paper="Rafailov 2023, 2305.18290",
    symbol="scorer",
    evidence="log-probabilities by numpy; prompt and padding do not count; adapter off is the base",
    kind="component",
)
