r"""ICM-LoRA: a conditional variational autoencoder writes an adapter from a task vector.

==========  ======================================================================================
c           task vector: mean hidden state of in-context examples (`task_vector`), [E]
x           the adapter: standardised tokens, flat and padded with zeros to N = 2^m q numbers, [K]
e, d        encoder and decoder, m convolutions each
z           latent, `latent` numbers
beta        ``beta``, weight of the divergence
==========  ======================================================================================

.. math::
    h &= e(x), \qquad (\mu, \log \sigma^2) = W [h; c] + w, \qquad z = \mu + \sigma \epsilon \\
    L &= \overline{(d(z, c) - x)^2} + \beta\, \mathrm{KL}\big(N(\mu, \sigma^2) \,\|\, N(0, I)\big),
    \qquad \mathrm{KL} = \tfrac12 \sum_j (\mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2)

The encoder halves the length m times (kernel 7, stride 2, norm, LeakyReLU) and ends in a matrix;
the decoder starts with a matrix on [z; c] and doubles the length m times (transposed convolution,
norm, ELU; the last one alone). A new adapter is d(z, c) for z drawn from N(0, I), de-standardised
with the statistics of the whole bank. Only the decoder is kept: it is what replaces the bank.

Reference: Shao 2025, 2501.17635, and the layer list of its released code.
Deviates: norm and scale of the bank, where the code takes those of one reference checkpoint, which
a new task does not have; the norm of a layer is over places and channels of one example, without
parameters, where the code has batch norm, because one adapter at a time is written; one model for
all tasks; the task vector holds a mean for each class apart, because an encoder is not shown the
answers; the divergence is summed over latent numbers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.codecs.train import draw_params
from jlora.generation.generators import descent, standardise
from jlora.types import Tree

KERNEL, STRIDE = 7, 2


@dataclasses.dataclass(frozen=True)
class ICMLoRAConfig:
    """Hyper-parameters; the defaults are the paper's."""

    channels: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)  # m of them
    latent: int = 256  # numbers of z
    beta: float = 0.005  # weight of the divergence
    steps: int = 2000  # of training; the paper's epochs
    batch: int = 2  # adapters per step
    rate: float = 2e-4  # of Adam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ICMLoRA:
    """The state of the generator."""

    params: Tree  # of the decoder
    mean: Float[Array, "E"]  # of the task vectors
    size: Float[Array, ""]  # root mean square of the centred task vectors
    standard: standardise.Standard  # adapters to tokens
    config: ICMLoRAConfig = dataclasses.field(metadata={"static": True})


def task_vector(
    states: Float[Array, "n d"], labels: Int[Array, "n"], classes: int
) -> Float[Array, "classes*d"]:
    """The condition of a task: its in-context examples' mean hidden state, for each class.

    Args:
      states: one hidden state of the frozen base per example: of the last layer, at the last token
        of a decoder, or pooled over tokens.
      labels: class of each example, 0 to classes - 1.
      classes: how many; each must have an example.

    Returns:
      The means, one after the other.

    Raises:
      ValueError: shapes that do not fit, or a class without examples (outside of transformations).
    """
    if states.ndim != 2 or labels.shape != states.shape[:1]:
        raise ValueError(
            f"states, labels: got {states.shape}, {labels.shape}, expected (n, d), (n,)"
        )
    if not isinstance(labels, jax.core.Tracer):
        empty = set(range(classes)) - set(np.asarray(labels).tolist())
        if empty:
            raise ValueError(f"labels: got no example of class {min(empty)}, expected one of each")
    member = jax.nn.one_hot(labels, classes, axis=0, dtype=states.dtype)  # [classes, n]
    return (member @ states / jnp.sum(member, axis=1)[:, None]).reshape(-1)


class Conv(nn.Module):
    """A convolution of kernel 7 and stride 2, [n, c] -> [n / 2, features], or its transpose.

    Written as one matmul over windows, which is faster than XLA's own on a CPU.
    """

    features: int
    up: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "m o"]:
        c, step = x.shape[1], 1 if self.up else STRIDE
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (KERNEL, c, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.up:  # zeros between the places
            x = jnp.stack([x, jnp.zeros_like(x)], axis=1).reshape(-1, c)
        n, side = x.shape[0], KERNEL // 2
        x = jnp.pad(x, ((side, side), (0, 0)))
        windows = jnp.concatenate([x[k : k + n : step] for k in range(KERNEL)], axis=1)
        return windows @ kernel.reshape(-1, self.features) + bias[None]


def norm(x: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Zero mean and unit variance over places and channels, eps 1e-5.

    Args:
      x: n places of c channels.

    Returns:
      The same shape.
    """
    x = x - jnp.mean(x)
    return x * jax.lax.rsqrt(jnp.mean(x * x) + 1e-5)


class CVAE(nn.Module):
    """Encoder and decoder of one flat adapter."""

    config: ICMLoRAConfig
    size: int  # K

    def setup(self) -> None:
        """Makes the layers."""
        channels = self.config.channels
        self.columns = -(-self.size // STRIDE ** len(channels))  # q
        self.down = [Conv(c) for c in channels]
        self.squeeze = nn.Dense(self.config.latent)
        self.moments = nn.Dense(2 * self.config.latent)
        self.spread = nn.Dense(self.columns * channels[-1])
        self.up = [Conv(c, up=True) for c in (*channels[-2::-1], 1)]

    def encode(
        self, x: Float[Array, "K"], c: Float[Array, "E"]
    ) -> tuple[Float[Array, "latent"], Float[Array, "latent"]]:
        """The posterior of one adapter.

        Args:
          x: its numbers, standardised.
          c: its task vector, centred.

        Returns:
          mu and log sigma^2.
        """
        padded = self.columns * STRIDE ** len(self.config.channels)
        h = jnp.pad(x, (0, padded - self.size))[:, None]
        for conv in self.down:
            h = nn.leaky_relu(norm(conv(h)))
        both = self.moments(jnp.concatenate([self.squeeze(h.reshape(-1)), c]))
        mu, log_variance = jnp.split(both, 2)
        return mu, log_variance

    def decode(self, z: Float[Array, "latent"], c: Float[Array, "E"]) -> Float[Array, "K"]:
        """The adapter of a latent.

        Args:
          z: the latent.
          c: the task vector, centred.

        Returns:
          Its numbers, standardised.
        """
        h = self.spread(jnp.concatenate([z, c])).reshape(self.columns, -1)
        for conv in self.up[:-1]:
            h = nn.elu(norm(conv(h)))
        return self.up[-1](h)[: self.size, 0]

    def __call__(
        self, x: Float[Array, "K"], c: Float[Array, "E"], noise: Float[Array, "latent"]
    ) -> tuple[Float[Array, "K"], Float[Array, ""]]:
        mu, log_variance = self.encode(x, c)
        z = mu + jnp.exp(0.5 * log_variance) * noise
        divergence = 0.5 * jnp.sum(mu**2 + jnp.exp(log_variance) - 1 - log_variance)
        return self.decode(z, c), divergence


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    config: ICMLoRAConfig | None = None,
) -> ICMLoRA:
    """Trains the autoencoder.

    Args:
      key: of the parameters, rows and noise.
      conditions: task vector of each adapter; not all alike.
      tasks: of each adapter; not used, every adapter counts alike.
      bank: n adapters of LoRA that differ in what is trained alone.
      config: hyper-parameters; None: those of `ICMLoRAConfig`.

    Returns:
      The state: decoder and statistics.

    Raises:
      ValueError: no channels, conditions that are not finite or all alike, or a bank that
        `standardise.fit` refuses.
      FloatingPointError: the loss is not finite.
    """
    del tasks
    config = config or ICMLoRAConfig()
    if not config.channels or min(*config.channels, config.latent, config.batch) < 1:
        raise ValueError(f"got {config}, expected channels, latent and batch of at least 1")
    mean, size = standardise.centre(conditions)
    standard, x = standardise.fit(bank)
    flat, c = x.reshape(len(x), -1), (conditions - mean[None]) / size
    begin, steps = jax.random.split(key)
    model = CVAE(config, flat.shape[1])
    params = draw_params(begin, model, flat[0], c[0], jnp.zeros(config.latent))
    data = flat, c, standardise.loss_weights(standard).reshape(-1)
    params, _ = descent.minimise(loss, solver, model, params, steps, data, config.steps)
    kept = {name: p for name, p in params.items() if name.startswith(("spread", "up"))}
    return ICMLoRA(kept, mean, size, standard, config)


def loss(
    model: CVAE, params: Tree, key: PRNGKeyArray, done: Float[Array, ""], data: Tree
) -> Float[Array, ""]:
    """L, its mean over a batch of adapters.

    Args:
      model: the autoencoder, unbound.
      params: its parameters.
      key: of the rows and the noise.
      done: not used.
      data: (adapters [n, K], task vectors [n, E], weights of the numbers [K]).

    Returns:
      The loss.
    """
    del done
    x, c, weights = data
    pick, noise = jax.random.split(key)
    rows = jax.random.randint(pick, (model.config.batch,), 0, len(x))
    draws = jax.random.normal(noise, (model.config.batch, model.config.latent))
    decoded, divergence = jax.vmap(model.bind({"params": params}))(x[rows], c[rows], draws)
    square = jnp.sum(weights[None] * jnp.square(decoded - x[rows]), axis=1)
    return jnp.mean(square + model.config.beta * divergence)


def solver(model: CVAE) -> optax.GradientTransformation:
    """Adam.

    Args:
      model: whose settings hold the rate.

    Returns:
      The optimizer.
    """
    return optax.adam(model.config.rate)


def generate(key: PRNGKeyArray, state: ICMLoRA, condition: Float[Array, "E"]) -> Adapter:
    """One adapter.

    Args:
      key: of the latent: another key is another sample.
      state: of `fit`.
      condition: task vector of the task.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    c = (checked(condition, state.mean.shape[0]) - state.mean) / state.size
    return _generate(key, state, c)


@jax.jit
def _generate(key: PRNGKeyArray, state: ICMLoRA, c: Array) -> Adapter:
    shape = state.standard.norm.mean.shape
    model = CVAE(state.config, shape[0] * shape[1])
    z = jax.random.normal(key, (state.config.latent,), c.dtype)
    x = model.apply({"params": state.params}, z, c, method="decode")
    return standardise.adapter(state.standard, jnp.asarray(x).reshape(shape))


def size_in_bytes(state: ICMLoRA) -> int:
    """What has to be stored to generate.

    Args:
      state: of `fit`.

    Returns:
      Bytes of the decoder and of the statistics; what is frozen in every adapter is left out.
    """
    kept = (state.params, state.mean, state.size, state.standard.norm)
    return sum(t.size * t.dtype.itemsize for t in jax.tree.leaves(kept))


SYSTEM = Generator(
    name="ICM-LoRA",
    paper="Shao 2025, 2501.17635",
    symbol="ICMLoRA",
    evidence="loss by numpy and scipy; convolutions by torch; tasks get their own adapter",
    rows=(3,),
    tests=("tests/generation/generators/learning_test.py",),
    claim="icm_lora",
    fit=fit,
    generate=generate,
    small={"config": ICMLoRAConfig(channels=(4, 4), latent=3, steps=30, rate=1e-2)},
)
