r"""Cond P-Diff on styles: the paper's autoencoder and its conditional latent DDPM.

.. math::
    w = (\theta - \mu) / \sigma, \qquad z = E(w), \qquad
    \min E\,\| \epsilon - \epsilon_\theta(z_t, t, P c) \|^2, \qquad \theta' = \mu + \sigma D(z')

Symbols: :math:`\theta` the flat trained factors A and B of an adapter, [K], :math:`\mu, \sigma`
mean and deviation of each number over the whole zoo, E and D the 1-D convolutional autoencoder of
`jlora.generation.codecs.conv`, :math:`\epsilon_\theta` its 1-D U-Net, c the condition, P a fixed
random projection to 128 numbers. A new adapter is an ancestral sample, decoded.

Reference: Jin 2024, 2408.01415 (Conditional P-Diff).
Deviates: statistics of the whole zoo, where the released code takes those of the task that is asked
for, which hold its soup and which a new style does not have; widths of decoder and U-Net and the
number of ancestral steps are smaller, for CPUs; the condition is that of the other generators, the
paper's a ResNet18 of a style picture; latents have unit scale.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

import jlora as jl
from jlora.generation.codecs import conv
from jlora.generation.diffusion import dit, loss, paths, samplers, unet1d
from jlora.generation.generators import standardise

OBJECTIVE = loss.Objective(paths.ddpm_linear(), "eps", times="discrete", drop=0.0)
WIDTH = 128  # numbers of the projected condition
CLIP = 4.0  # of the data estimate, in deviations of the latents


@dataclasses.dataclass(frozen=True)
class PdiffConfig:
    """Hyper-parameters; depths and rates are the paper's."""

    ae_steps: int = 1500  # of the autoencoder's training
    ae_width: int = 16  # its inner decoder channels; the paper's 256
    steps: int = 1500  # of the DDPM's training
    width: int = 16  # first width of the U-Net, doubled level by level; the paper's 64
    levels: int = 4  # blocks of the autoencoder, and widths of the U-Net; at least 2
    batch: int = 32  # adapters per step
    sample_steps: int = 100  # ancestral steps; the paper's 1000


class Pdiff(NamedTuple):
    """The fitted state."""

    params: Any  # of the U-Net
    codec: conv.ConvAEState
    mean: Array  # [K] of the zoo
    size: Array  # [K] its deviation, 1 where nothing varies
    centre: Array  # [E] of the conditions
    spread: Array  # [] of the conditions
    projection: Array  # [E, WIDTH]


def network(config: PdiffConfig) -> unet1d.UNet1d:
    """The U-Net with widths w, 2 w, 4 w, ..."""
    return unet1d.UNet1d(channels=tuple(config.width * 2**i for i in range(config.levels)))


def flat(adapter: jl.Adapter) -> Array:
    """The trained factors of one adapter as one vector [K]."""
    return ravel_pytree(adapter.trainable)[0]


def unflat(template: jl.Adapter, theta: Array) -> jl.Adapter:
    """What undoes `flat`."""
    return template.replace(trainable=ravel_pytree(template.trainable)[1](theta))


def fit(key: Array, conditions: Array, theta: Array, config: PdiffConfig) -> Pdiff:
    """Trains the autoencoder, then the DDPM.

    Args:
      key: of both.
      conditions: [n, E] of each adapter.
      theta: [n, K] of `flat`.
      config: hyper-parameters.

    Raises:
      FloatingPointError: a loss that is not finite.
      ValueError: conditions that are all alike, too few numbers for the autoencoder.
    """
    k_ae, k_start, k_steps, k_map = jax.random.split(key, 4)
    centre, spread = standardise.centre(conditions)
    mean, size = theta.mean(0), theta.std(0)
    size = jnp.where(size > 1e-8, size, jnp.ones_like(size))
    w = ((theta - mean[None]) / size[None])[:, None]  # [n, 1, K]
    inner = (config.ae_width,) * (config.levels - 2)
    ae = conv.ConvAEConfig(
        (4,) * config.levels, (4, *inner, 8), steps=config.ae_steps, batch=16,
        chunk=min(100, config.ae_steps),
    )  # fmt: skip
    codec, _ = conv.fit(k_ae, w, ae)
    z = jax.lax.map(functools.partial(conv.encode, codec), w)
    projection = jax.random.normal(k_map, (conditions.shape[1], WIDTH))
    projection = projection / jnp.sqrt(jnp.float32(conditions.shape[1]))
    cond = ((conditions - centre[None]) / spread) @ projection
    params, losses = _train(config, k_start, k_steps, z, cond[:, None])
    if not np.isfinite(losses).all():
        bad = int(np.argmin(np.isfinite(losses)))
        raise FloatingPointError(f"Cond P-Diff: the loss is not finite at step {bad}")
    return Pdiff(params, codec, mean, size, centre, spread, projection)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    config: PdiffConfig, start: Array, steps: Array, z: Array, cond: Array
) -> tuple[Any, Array]:
    """Parameters, and the loss of each step."""
    net, rule = network(config), optax.adamw(1e-3, weight_decay=1e-2)
    model = dit.bind(net)
    params = dit.init(net, start, (z.shape[1], z.shape[2]), (1, WIDTH))

    def step(carry: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], Array]:
        params, moments = carry
        pick, draw = jax.random.split(jax.random.fold_in(steps, number))
        rows = jax.random.randint(pick, (config.batch,), 0, len(z))

        def value(params: Any) -> Array:
            return loss.diffusion_loss(model, params, draw, z[rows], cond[rows], OBJECTIVE)[0]

        total, grads = jax.value_and_grad(value)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, moments = rule.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), total

    count = jnp.arange(config.steps, dtype=jnp.int32)
    (params, _), losses = jax.lax.scan(step, (params, rule.init(params)), count)
    return params, losses


@functools.cache
def sampler(config: PdiffConfig) -> Callable[..., tuple[Array, Array]]:
    """``(key, state, condition [E]) -> (latents [S, L], those on the way [steps + 1, S, L])``.

    Args:
      config: hyper-parameters.
    """
    model = dit.bind(network(config))
    plan = samplers.Sampler("ddpm", config.sample_steps, clip=CLIP)

    def run(key: Array, state: Pdiff, condition: Array) -> Any:
        c = (((condition - state.centre) / state.spread) @ state.projection)[None]

        def denoise(z: Array, t: Array) -> Array:
            return model(state.params, z, t, c, jnp.asarray(False))[0]

        shape = state.codec.mean.shape
        return samplers.sample(
            denoise, key, shape, OBJECTIVE.path, OBJECTIVE.kind, plan, trajectory=True
        )

    return jax.jit(run)


@jax.jit
def decode(state: Pdiff, z: Array) -> Array:
    """Flat factors [K] of latents [S, L]."""
    return state.mean + state.size * conv.decode(state.codec, z)[0]


@jax.jit
def encode(state: Pdiff, theta: Array) -> Array:
    """Latents [S, L] of flat factors [K]."""
    return conv.encode(state.codec, ((theta - state.mean) / state.size)[None])


def generate(key: Array, state: Pdiff, condition: Array, config: PdiffConfig) -> Array:
    """Flat factors [K] of one sample.

    Args:
      key: of the noise.
      state: of `fit`.
      condition: [E].
      config: that of `fit`.
    """
    return decode(state, sampler(config)(key, state, condition)[0])
