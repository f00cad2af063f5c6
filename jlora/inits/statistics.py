"""Sums over batches that initialisations from data start from, one batch after the other.

`jlora.analysis.taps` and `jlora.analysis.gradients` make the same of a function and its batches.

Deviates: nothing.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora import numerics
from jlora.analysis.taps import Moments
from jlora.core.adapter import Adapter

Gradients = Mapping[str, Float[Array, "*stack d_in d_out"]]  # by path
Rows = Mapping[str, Float[Array, "*stack n d_in"]]  # by path


def no_gradients(adapter: Adapter) -> dict[str, Array]:
    """Sums of gradients before the first one.

    Args:
      adapter: its sites.

    Returns:
      path -> zeros [*stack, d_in, d_out].
    """
    return {s.path: jnp.zeros((*s.stack, s.d_in, s.d_out), s.param_dtype) for s, _ in adapter.sites}


def sum_gradients(
    total: Gradients,
    batch: Gradients,
) -> dict[str, Array]:
    """Sums of gradients with those of one more batch.

    Args:
      total: path -> the sum so far.
      batch: path -> a gradient.

    Returns:
      path -> the sum.
    """
    return {path: t + batch[path] for path, t in total.items()}


def no_moments(adapter: Adapter) -> dict[str, Moments]:
    """Moments of the inputs before the first batch.

    Args:
      adapter: its sites.

    Returns:
      By path.
    """
    moments = {}
    for s, _ in adapter.sites:
        shapes = ((*s.stack, s.d_in, s.d_in), (*s.stack, s.d_in), s.stack)
        moments[s.path] = Moments(*(jnp.zeros(shape, s.param_dtype) for shape in shapes))
    return moments


def sum_moments(total: Mapping[str, Moments], batch: Rows) -> dict[str, Moments]:
    """Moments of the inputs with one more batch.

    Args:
      total: by path.
      batch: path -> input rows [*stack, n, d_in].

    Returns:
      By path.
    """
    moments = {}
    for path, m in total.items():
        x = batch[path]
        second = m.second + numerics.matmul(x.mT, x)
        moments[path] = Moments(second, m.first + x.sum(-2), m.count + x.shape[-2])
    return moments
