r"""Which written texts look like the texts that an adapter was trained on.

===========  ==================================================================================
x            embedding of a text by the frozen source base, [d]
R, S         embeddings of real texts [n, d] and of written ones [m, d]
mu, sigma    mean and deviation of each feature over R and S together
ell(x)       log-odds of "real", log p(yes | x) - log p(no | x)
lambda       penalty of the weights
===========  ==================================================================================

.. math::
    \ell(x) = w \cdot \frac{x - \mu}{\sigma} + c, \qquad
    \min_{w, c}\; \frac{1}{2n} \sum_{x \in R} \log(1 + e^{-\ell(x)})
    + \frac{1}{2m} \sum_{x \in S} \log(1 + e^{\ell(x)}) + \frac{\lambda}{2} \lVert w \rVert^2

Both classes weigh the same whatever n and m, so the odds are those of an even prior. The best
texts of a number that was written are kept (`accept`), which needs a ranking only.

Reference: Wang et al. 2024, arXiv:2405.17258.
Deviates: the paper trains a second LoRA of the source base to answer "yes" or "no", against text
that this base writes, and writes on until enough has p(yes) > p(no); here a logistic regression
reads the frozen base's embedding, text may come from any decoder, and of a fixed number of texts
the most likely ones are kept, so that the cost is known beforehand.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jlora.types import Dynamic

TINY = 1e-6  # a feature that varies less is not scaled up


class Discriminator(NamedTuple):
    """A trained discriminator; it holds no text."""

    weight: Float[Array, "d"]  # w
    bias: Float[Array, ""]  # c
    mean: Float[Array, "d"]  # mu
    deviation: Float[Array, "d"]  # sigma


def fit(
    real: Float[Array, "n d"],
    written: Float[Array, "m d"],
    *,
    penalty: float = 1e-2,
    steps: int = 60,
) -> Discriminator:
    """Trains a discriminator by L-BFGS over all rows.

    Args:
      real: embeddings of texts of the task, R.
      written: embeddings of texts that were written, S.
      penalty: lambda; above 0, because few rows of many features can be separated and their odds
        would grow without end.
      steps: of L-BFGS; 60 bring the gradient of a few hundred rows to rounding.

    Returns:
      The discriminator.

    Raises:
      ValueError: no rows, widths that differ, or a penalty that is not above 0.
    """
    if real.ndim != 2 or written.ndim != 2 or real.shape[1] != written.shape[1]:
        raise ValueError(
            f"discriminator: got real {real.shape} and written {written.shape}, expected [n, d] and"
            " [m, d] of one width"
        )
    if not real.shape[0] or not written.shape[0]:
        raise ValueError(
            f"discriminator: got {real.shape[0]} real and {written.shape[0]} written rows, expected"
            " one of each at least"
        )
    if not penalty > 0:
        raise ValueError(f"discriminator: penalty: got {penalty}, expected above 0")
    both = jnp.concatenate([real, written])
    mean, deviation = both.mean(0), jnp.maximum(both.std(0), TINY)
    start = Discriminator(jnp.zeros_like(mean), jnp.zeros((), both.dtype), mean, deviation)

    def loss(free: tuple[Array, Array]) -> Array:
        now = start._replace(weight=free[0], bias=free[1])
        wrong = jax.nn.softplus(-log_odds(now, real)).mean()
        wrong += jax.nn.softplus(log_odds(now, written)).mean()
        return wrong / 2 + penalty / 2 * jnp.sum(free[0] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Dynamic, _: None) -> tuple[Dynamic, None]:
        free, state = carry
        value, grads = value_and_grad(free, state=state)
        updates, state = solver.update(grads, state, free, value=value, grad=grads, value_fn=loss)
        return (optax.apply_updates(free, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # its line search mixes weak and strong floats
        free = start.weight, start.bias
        (free, _), _ = jax.lax.scan(step, (free, solver.init(free)), length=steps)
    return start._replace(weight=free[0], bias=free[1])


def log_odds(discriminator: Discriminator, embedding: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    """How much more likely texts are real than written.

    Args:
      discriminator: of `fit`.
      embedding: of texts, by the base that it was trained on.

    Returns:
      ell; above 0 where p(yes) > p(no).

    Raises:
      ValueError: embeddings of another width.
    """
    if embedding.shape[-1:] != discriminator.weight.shape:
        raise ValueError(
            f"discriminator: got embeddings {embedding.shape}, expected [..., "
            f"{discriminator.weight.shape[0]}]"
        )
    scaled = discriminator.weight / discriminator.deviation
    offset = discriminator.bias - jnp.dot(discriminator.mean, scaled)
    return jnp.matmul(embedding, scaled) + offset


def accept(odds: Float[Array, "N"], keep: int) -> Int[Array, "keep"]:
    """The texts that are most likely real.

    Args:
      odds: log-odds of all texts that were written.
      keep: how many are kept; static.

    Returns:
      Their numbers, the most likely first, int32.

    Raises:
      ValueError: `keep` is not between 1 and N.
    """
    if not 1 <= keep <= odds.shape[0]:
        raise ValueError(f"keep: got {keep}, expected 1 to {odds.shape[0]} written texts")
    return jax.lax.top_k(odds, keep)[1].astype(jnp.int32)
