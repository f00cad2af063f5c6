r"""A diffusion policy: a small denoiser of actions, cloned from demonstrations.

=====  ===================================================================================
s, a   an observation and the expert's action
K      noise levels; :math:`\bar\alpha_k` is what is left of the action at level k
e      the denoiser, an MLP of the noisy action, the level and s
=====  ===================================================================================

.. math::
    \min_\theta\; \mathbb{E}\, \lVert \epsilon -
    e_\theta(\sqrt{\bar\alpha_k}\, a + \sqrt{1 - \bar\alpha_k}\, \epsilon,\; k,\; s) \rVert^2

An action is drawn by the K steps of DDPM from noise. Whatever denoiser is given (the base, one with
an adapter, a composition) is a function of (noisy action, level, observation).

Reference: Ho et al. 2020, arXiv:2006.11239 (DDPM); Chi et al. 2023, arXiv:2303.04137 (diffusion
    policies).
Deviates: one action at a time and an MLP of three layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.types import Dynamic, Tree

LEVELS = 10  # K
FREQUENCIES = 4  # of a level, sine and cosine each
BATCH, RATE = 256, 1e-3

Denoiser = Callable[[Array, Array, Array], Array]  # (noisy a [b, m], k [b], s [b, d]) -> [b, m]


class Demos(NamedTuple):
    """What an expert did."""

    observation: Float[np.ndarray, "n d"]
    action: Float[np.ndarray, "n m"]


def remains(levels: int = LEVELS) -> Float[Array, "K"]:
    """The cosine schedule.

    Args:
      levels: K.

    Returns:
      What is left of the action at each level, most first.
    """
    at = np.cos((np.arange(1, levels + 1) / levels + 0.008) / 1.008 * math.pi / 2) ** 2
    return jnp.asarray(np.clip(at / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, 1e-3, 1), "f4")


def init(key: PRNGKeyArray, d_obs: int, d_action: int, width: int) -> Tree:
    """Weights of the denoiser.

    Args:
      key: of the draw.
      d_obs: d.
      d_action: m.
      width: of the two hidden layers.

    Returns:
      Kernels and biases of three layers.
    """
    sizes = (d_action + 2 * FREQUENCIES + d_obs, width, width, d_action)
    keys = jax.random.split(key, len(sizes) - 1)
    names = ("first", "middle", "last")
    return {
        n: {"kernel": jax.random.normal(k, (i, o)) / math.sqrt(i), "bias": jnp.zeros(o)}
        for n, k, i, o in zip(names, keys, sizes, sizes[1:], strict=False)
    }


def inputs(a: Array, k: Array, s: Array) -> Float[Array, "b in"]:
    """What the MLP reads.

    Args:
      a: noisy actions [b, m].
      k: levels [b], from 0.
      s: observations [b, d].

    Returns:
      Actions, sines and cosines of the level, observations.
    """
    at = k.astype(jnp.float32)[:, None] / LEVELS
    at = at * jnp.pi * 2.0 ** jnp.arange(FREQUENCIES, dtype=jnp.float32)[None]
    return jnp.concatenate([a, jnp.sin(at), jnp.cos(at), s], axis=-1)


def model(params: Tree, x: Float[Array, "b in"]) -> Float[Array, "b m"]:
    """The MLP.

    Args:
      params: of `init`.
      x: of `inputs`.

    Returns:
      The predicted noise.
    """
    for name in ("first", "middle"):
        x = jax.nn.silu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["last"]["kernel"] + params["last"]["bias"][None]


def loss(
    denoiser: Denoiser, key: PRNGKeyArray, s: Float[Array, "b d"], a: Float[Array, "b m"]
) -> Float[Array, ""]:
    """The denoising loss of a batch.

    Args:
      denoiser: e.
      key: of levels and noise.
      s: observations.
      a: actions of the expert.

    Returns:
      Mean squared error.
    """
    one, second = jax.random.split(key)
    k = jax.random.randint(one, (len(a),), 0, LEVELS)
    left, noise = remains()[k][:, None], jax.random.normal(second, a.shape)
    noisy = jnp.sqrt(left) * a + jnp.sqrt(1 - left) * noise
    return jnp.mean((denoiser(noisy, k, s) - noise) ** 2)


def draw(denoiser: Denoiser, key: PRNGKeyArray, s: Float[Array, "b d"], size: int) -> Array:
    """Actions from noise.

    Args:
      denoiser: e.
      key: of the noise.
      s: observations.
      size: m.

    Returns:
      [b, m], within -1 and 1.
    """
    left = remains()
    before = jnp.concatenate([jnp.ones(1), left[:-1]])

    def step(a: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        k, key = at
        e = denoiser(a, jnp.full(len(a), k), s)
        clean = jnp.clip((a - jnp.sqrt(1 - left[k]) * e) / jnp.sqrt(left[k]), -1.0, 1.0)
        keep = left[k] / before[k]
        mean = (jnp.sqrt(before[k]) * (1 - keep) * clean + jnp.sqrt(keep) * (1 - before[k]) * a) / (
            1 - left[k]
        )
        spread = jnp.sqrt((1 - before[k]) * (1 - keep) / (1 - left[k]))
        return mean + spread * jax.random.normal(key, a.shape), None

    first, rest = jax.random.split(key)
    order = jnp.arange(LEVELS)[::-1], jax.random.split(rest, LEVELS)
    a, _ = jax.lax.scan(step, jax.random.normal(first, (len(s), size)), order)
    return jnp.clip(a, -1.0, 1.0)


def fit(
    key: PRNGKeyArray,
    trained: Tree,
    objective: Callable[[Tree, PRNGKeyArray, Array, Array], Array],
    demos: Demos,
    steps: int,
) -> Tree:
    """What is trained, after as many steps of Adam.

    Args:
      key: of batches, levels and noise.
      trained: its start.
      objective: (trained, key, observations, actions) -> loss.
      demos: of the expert.
      steps: of batches of `BATCH`.

    Returns:
      The trained PyTree.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    s, a = (jnp.asarray(t) for t in demos)

    @jax.jit
    def run(trained: Tree, keys: Array) -> Tree:
        def one(carry: Dynamic, key: Array) -> Dynamic:
            trained, state = carry
            pick, rest = jax.random.split(key)
            at = jax.random.randint(pick, (BATCH,), 0, len(s))
            slope = jax.grad(objective)(trained, rest, s[at], a[at])
            change, state = optimizer.update(slope, state)
            return (optax.apply_updates(trained, change), state), None

        return jax.lax.scan(one, (trained, optimizer.init(trained)), keys)[0][0]

    keys = jax.random.split(key, steps)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        return run(trained, keys)
