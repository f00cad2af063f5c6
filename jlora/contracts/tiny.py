"""A tiny model and adapters of it: what the laws of several kinds are measured on.

All laws share these shapes, so that one process compiles each small operation once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.core.adapter import Adapter
from jlora.core.init import initialise
from jlora.core.method import Method
from jlora.core.sites import sites

WIDTH, HIDDEN, TOKENS = 5, 6, 3
PATTERN = "first|layers|last"

Params = dict[str, Array]


def params(seed: int = 0) -> Params:
    """Random weights of `model`.

    Args:
      seed: of the draws.

    Returns:
      first [5, 6], layers [2, 6, 6] and last [6, 5], float32.
    """
    shapes = {"first": (WIDTH, HIDDEN), "layers": (2, HIDDEN, HIDDEN), "last": (HIDDEN, WIDTH)}
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for k, s in shapes.items()}


def inputs(count: int, seed: int = 1) -> Float[Array, "count 3 5"]:
    """Random inputs of `model`.

    Args:
      count: how many.
      seed: of the draws.

    Returns:
      float32.
    """
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, TOKENS, WIDTH)), jnp.float32)


def model(p: Params, z: Float[Array, "*t 5"], t: Float[Array, ""]) -> Float[Array, "*t 5"]:
    """A network of four layers, two of them in a scan, that depends on a time.

    Args:
      p: weights, as of `params`.
      z: inputs.
      t: the time.

    Returns:
      Outputs, as z.
    """
    h = jnp.tanh(z @ p["first"] + t.astype(z.dtype))
    return jax.lax.scan(_layer, h, p["layers"])[0] @ p["last"]


def _layer(h: Array, w: Array) -> tuple[Array, None]:
    return jnp.tanh(h @ w), None


def fresh(method: Method, p: Params, seed: int = 0) -> Adapter:
    """An untrained adapter of all weights of `model`.

    Args:
      method: the adaptation method of all sites.
      p: the weights.
      seed: of its `init`.

    Returns:
      The adapter, which changes nothing.
    """
    every = sites(model, p, inputs(1)[0], jnp.zeros(()))
    return initialise(jax.random.key(seed), every.select({PATTERN: method}), p)


def moved(adapter: Adapter, seed: int = 0, size: float = 0.3) -> Adapter:
    """An adapter like a trained one: with noise on all that is trained.

    Args:
      adapter: any.
      seed: of the noise.
      size: its standard deviation.

    Returns:
      One like it.
    """
    rng = np.random.default_rng(seed)

    def move(t: Array) -> Array:
        return t + jnp.asarray(size * rng.normal(size=t.shape), t.dtype)

    return adapter.replace(trainable=jax.tree.map(move, adapter.trainable))


def trained(methods: Sequence[Method], p: Params) -> tuple[Adapter, ...]:
    """One adapter like a trained one per method.

    Args:
      methods: adaptation methods; ranks may differ.
      p: the weights.

    Returns:
      The adapters, all different.
    """
    return tuple(moved(fresh(m, p, k), 10 + k) for k, m in enumerate(methods))
