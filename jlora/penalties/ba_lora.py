r"""BA-LoRA: three terms of the logits against what is wrong with the data, from PiSSA's start.

==============  ==============================================================================
Z, Z'           logits of the tuned and of the pre-trained model, [n, d] or [n, tokens, d]
p, p'           their softmax over the last axis
C               covariance of the columns of Z over the n rows, [d, d]
sigma           singular values of Z, [n, ...] as one matrix, in falling order
lambda          weights: 1e-4, 3e-4, 1e-4
==============  ==============================================================================

For understanding (`nlu`), with rows z, z' of norm 1, and for generation (`nlg`):

.. math:: L_1 = \mathrm{mean} (\hat Z - \hat Z')^2, \quad
          L_2 = \frac1d \sum_{i \ne j} C_{ij}^2, \quad
          L_3 = - \frac{\sum_{i \le k} \sigma_i}{\sum_i \sigma_i}

.. math:: L_1 = \mathrm{KL}(p' \| p), \quad L_2 = \mathrm{mean} \sum_v p_v \log p_v, \quad L_3

.. math:: L = L_{task} + \lambda_1 L_1 + \lambda_2 L_2 + \lambda_3 L_3

L_1 keeps what was known before, L_2 keeps features from collapsing (maximises entropy), L_3 keeps
the logits in k directions, so that noise has no room. The pre-trained logits are those of the
weights without the adapter: ``model(params, x)`` next to ``jl.lift(model)(params, adapter, x)``; an
adapter of `jl.inits.pissa` starts there.

Paper: Chang et al. 2024, arXiv:2408.04556.
Source: paper and official code.
Deviates: L_3 has a gradient; in the official code it is a constant, and its index fails. Padding
can be left out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora import numerics
from jlora.contracts.penalty import Penalty
from jlora.core.adapter import Adapter
from jlora.core.site import at_least_float32
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic

TINY = 1e-12  # the smallest norm, and sum of singular values, that is divided by


class Terms(NamedTuple):
    """The three terms, [] each."""

    consistency: Array  # L_1, not negative
    diversity: Array  # L_2; not negative in `nlu`, not positive in `nlg`
    spectrum: Array  # L_3, from -1 to 0


def ba_lora(terms: Terms, weights: tuple[float, float, float] = (1e-4, 3e-4, 1e-4)) -> Array:
    """What is added to the loss.

    Args:
      terms: of `nlu` or `nlg`.
      weights: lambda 1 to 3; those of the official code.

    Returns:
      [].

    Raises:
      ValueError: a weight that is negative.
    """
    if min(weights) < 0:
        raise ValueError(f"weights: got {weights}, expected numbers >= 0")
    return sum((w * t for w, t in zip(weights, terms, strict=True)), jnp.zeros_like(terms[0]))


def nlu(logits: Float[Array, "n d"], pretrained: Float[Array, "n d"], k: int = 3) -> Terms:
    """The terms of a classifier.

    Args:
      logits: Z, of the tuned model; n >= 2.
      pretrained: Z', through which no gradient goes.
      k: singular values that may be large.

    Returns:
      The terms, at least float32.

    Raises:
      ValueError: logits of another shape, fewer than 2 rows, or k < 1.
    """
    if logits.ndim != 2 or logits.shape[0] < 2 or logits.shape != pretrained.shape:
        raise ValueError(f"logits: got {logits.shape} and {pretrained.shape}, expected [n, d] of "
                         "at least 2 rows")  # fmt: skip
    z, before = _wide(logits), jax.lax.stop_gradient(_wide(pretrained))
    centred = z - z.mean(0, keepdims=True)
    cov = numerics.matmul(centred.T, centred) / (z.shape[0] - 1)
    apart = cov * (1 - jnp.eye(z.shape[1], dtype=z.dtype))
    consistency = jnp.mean((_unit(z) - _unit(before)) ** 2)
    return Terms(consistency, jnp.sum(apart**2) / z.shape[1], spectrum(z, k))


def nlg(
    logits: Float[Array, "n *tokens d"], pretrained: Float[Array, "n *tokens d"], k: int = 3,
    mask: Bool[Array, "n *tokens"] | None = None, per_token: bool = False,
) -> Terms:  # fmt: skip
    """The terms of a language model.

    Args:
      logits: Z, of the tuned model.
      pretrained: Z', through which no gradient goes.
      k: singular values that may be large.
      mask: which tokens count; None: all, as in the official code.
      per_token: whether L_1 is a mean over tokens; else it is summed over those of a row and is a
        mean over rows, as in the official code.

    Returns:
      The terms, at least float32.

    Raises:
      ValueError: logits or a mask of other shapes, or k < 1.
    """
    if logits.shape != pretrained.shape or (mask is not None and mask.shape != logits.shape[:-1]):
        shapes = [None if x is None else x.shape for x in (logits, pretrained, mask)]
        raise ValueError("logits: got {}, pretrained {}, mask {}, expected one shape, the mask "
                         "without its last axis".format(*shapes))  # fmt: skip
    z, before = _wide(logits), jax.lax.stop_gradient(_wide(pretrained))
    count = jnp.ones(z.shape[:-1], z.dtype) if mask is None else mask.astype(z.dtype)
    log_p, log_before = jax.nn.log_softmax(z), jax.nn.log_softmax(before)
    divergence = jnp.sum(jnp.exp(log_before) * (log_before - log_p), axis=-1) * count
    negative = jnp.sum(jnp.exp(log_p) * log_p, axis=-1) * count
    tokens = jnp.maximum(jnp.sum(count), 1)
    consistency = jnp.sum(divergence) / (tokens if per_token else z.shape[0])
    matrix = (z * count[..., None]).reshape(z.shape[0], -1)
    return Terms(consistency, jnp.sum(negative) / tokens, spectrum(matrix, k))


def spectrum(matrix: Float[Array, "n d"], k: int) -> Array:
    """L_3: minus the share of the k largest singular values in the sum of all.

    Args:
      matrix: of logits.
      k: how many; at least 1.

    Returns:
      [], 0 for a matrix of zeros.

    Raises:
      ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    sigma = numerics.svd(matrix, compute_uv=False)
    return -jnp.sum(sigma[:k]) / jnp.maximum(jnp.sum(sigma), TINY)


def _wide(z: Array) -> Array:
    return z.astype(at_least_float32(z.dtype))


def _unit(z: Array) -> Array:
    square = jnp.sum(z**2, axis=-1, keepdims=True)
    some = square > TINY
    return z / jnp.sqrt(jnp.where(some, square, jnp.ones_like(square)))


# The record: the form for generation, of a model that is the one matrix "down".
def _penalty(adapter: Adapter, params: Dynamic, ctx: Dynamic) -> Array:
    del ctx
    w = params["down"]
    x = (jnp.arange(4 * 11, dtype=w.dtype).reshape(4, 11) % 7 - 3) / 4
    for site, method in adapter.sites:
        if site.path == "down":
            own = {**adapter.frozen[site.path], **adapter.trainable[site.path]}
            u, v = method.factors(method.prepare(own))  # type: ignore[misc]
            return ba_lora(nlg(x @ w + (x @ u) @ v, x @ w, 2), (1.0, 1.0, 1.0))
    return jnp.zeros((), w.dtype)


SYSTEM = Penalty(
    name="BA-LoRA",
    paper="Chang 2024, 2408.04556",
    symbol="ba_lora",
    kind="composition",
    claim="ba_lora",
    evidence="all terms of both forms by numpy and torch; consistency 0 at PiSSA's start",
    rows=(31,),
    examples=(LoRA(rank=2, alpha=2.0),),
    penalty=_penalty,
    breaks={"positive": "negative entropies, and a share of singular values that is maximised"},
)
