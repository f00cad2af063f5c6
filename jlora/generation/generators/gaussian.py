r"""A Gaussian over adapters in their principal components, given the condition: closed form.

==========  ======================================================================================
x_n, c_n    standardised adapters and their centred conditions, scaled to unit mean square, n of
            them
Z           their latents [n, L]: joint principal components of all numbers, mean zero
K           C C^T, inner products of conditions [n, n], and k(c) those of a new one
lambda      ``penalty``: variance of what the conditions do not explain
tau         ``temperature``
==========  ======================================================================================

Adapters and conditions are taken for jointly Gaussian, with lambda I added to the covariance of the
conditions. What a condition says of the latents is then

.. math::
    z \mid c \;\sim\; N\big( Z^T P\, k(c),\; \tau^2 \lambda\, Z^T P Z \big),
    \qquad P = (K + n \lambda I)^{-1} .

Its mean is ridge regression from the condition to the components. As lambda grows, the condition
counts for less, and the limit is the Gaussian of the bank alone, whose mean is the mean adapter and
whose covariance is that of the bank in its first L components.

Reference: Dravid 2024, 2406.09413 (weights2weights: principal components of many adapters, a linear
map and samples there); the conditional Gaussian is a textbook's.
Deviates: there the components are edited along directions of attributes; here they are conditioned
on an embedding.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import numerics
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.codecs import pca
from jlora.generation.generators import standardise


@dataclasses.dataclass(frozen=True)
class GaussianConfig:
    """Hyper-parameters."""

    components: int = 96  # L, at most the number of adapters less one
    penalty: float = 0.1  # lambda, in units of the mean square norm of a condition
    temperature: float = 1.0  # tau; 0: the mean alone


class Arrays(NamedTuple):
    """What is fitted."""

    mean: Float[Array, "E"]  # of the conditions
    size: Float[Array, ""]  # root mean square norm of the centred conditions
    given: Float[Array, "n E"]  # C
    regression: Float[Array, "n L"]  # P Z
    spread: Float[Array, "n L"]  # sqrt(lambda) P^1/2 Z: rows whose squares sum to the covariance
    codec: pca.PCAState  # tokens to latents
    standard: standardise.Standard  # adapters to tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The state of the generator."""

    arrays: Arrays
    config: GaussianConfig = dataclasses.field(metadata={"static": True})


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    config: GaussianConfig | None = None,
) -> Gaussian:
    """Components, regression and what is left.

    Args:
      key: not used.
      conditions: of each adapter; not all alike.
      tasks: of each adapter; not used, every adapter counts alike.
      bank: n adapters of LoRA that differ in what is trained alone.
      config: hyper-parameters; None: those of `GaussianConfig`.

    Returns:
      The state.

    Raises:
      ValueError: conditions that are not finite or all alike, a bank that `standardise.fit`
        refuses, no penalty, or a negative temperature.
    """
    del tasks
    config = config or GaussianConfig()
    if config.penalty <= 0 or config.temperature < 0:
        raise ValueError(f"got {config}, expected a penalty above 0 and no negative temperature")
    mean, number = standardise.centre(conditions)
    size = number * conditions.shape[1] ** 0.5
    standard, x = standardise.fit(bank)
    n, kept = len(x), min(config.components, len(x) - 1, x[0].size)
    codec, _ = pca.fit(key, x, pca.PCAConfig(components=kept, joint=True, whiten=False))
    z = jax.vmap(lambda one: pca.encode(codec, one)[0])(x)
    given = (conditions - mean[None]) / size
    values, vectors = numerics.eigh(numerics.matmul(given, given.T))
    values = jnp.maximum(values, 0) + n * config.penalty  # below zero is rounding
    turned = numerics.matmul(vectors.T, z)
    regression = numerics.matmul(vectors, turned / values[:, None])
    spread = jnp.sqrt(jnp.float32(config.penalty)) * turned / jnp.sqrt(values)[:, None]
    return Gaussian(Arrays(mean, size, given, regression, spread, codec, standard), config)


def generate(key: PRNGKeyArray, state: Gaussian, condition: Float[Array, "E"]) -> Adapter:
    """One sample.

    Args:
      key: of the noise: another key is another sample, unless the temperature is 0.
      state: of `fit`.
      condition: of the task.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    arrays = state.arrays
    query = (checked(condition, arrays.mean.shape[0]) - arrays.mean) / arrays.size
    z = numerics.matmul(numerics.matmul(arrays.given, query)[None], arrays.regression)
    noise = jax.random.normal(key, (1, arrays.spread.shape[0]), z.dtype)
    z = z + state.config.temperature * numerics.matmul(noise, arrays.spread)
    return standardise.adapter(arrays.standard, pca.decode(arrays.codec, z))


SYSTEM = Generator(
    name="Gaussian over principal components",
    paper="Dravid 2024, 2406.09413",
    symbol="Gaussian",
    evidence="mean and covariance by numpy from joint moments; both limits of the penalty",
    kind="component",
    fit=fit,
    generate=generate,
    small={"config": GaussianConfig(components=6)},
)
