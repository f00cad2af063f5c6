r"""Token autoencoder: one MLP shared by all sites, conditioned on the site by FiLM.

Encoder and decoder are residual MLPs; e_t is a learned embedding of token t, and each block is

.. math::
    h &\leftarrow h + W_2\, \mathrm{gelu}(W_1 ((1 + \gamma_i(e_t)) \odot \mathrm{LN}(h)
        + \beta_i(e_t))), \\
    z_t &= u / \sqrt{1 + \mathrm{mean}(u^2)}, \qquad u = W_z h .

The ball |z|^2 < L keeps the latent noise from being outgrown. Training, with xi, zeta standard
normal, x_t a token and D(x)_t its delta (`delta_error`, no dense dW):

.. math::
    \hat x &= \mathrm{dec}(\mathrm{enc}(x + 10^{-3} \xi) + 0.1\, \zeta), \\
    \mathcal L &= w_\Delta \frac{\|D(\hat x)_t - D(x)_t\|^2}{\|D(x)_t\|^2}
        + w_{\cos} (1 - \cos(D(\hat x)_t, D(x)_t)) + w_{mse} \|\hat x_t - x_t\|^2 / D,

mean over tokens and batch. Afterwards latents are standardised per coordinate with the training
set's mean and deviation. Symbols: w `delta_weight`, `cos_weight`, `mse_weight`; L `latent`.

Original to jlora; after the per-position latents and direction loss of LoRAGen (ICLR 2026).
Deviates: direction is that of the delta, not of each factor; relative error in place of the
spectral term; a small share (`floor`) of the batch's mean energy is added to the denominators, so
that a token whose delta is near zero does not rule the loss.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.generation.audit.delta_error import DeltaView, delta_terms
from jlora.generation.codecs.train import (
    Callback,
    Problem,
    TrainInfo,
    TrainState,
    draw_params,
    train,
)
from jlora.generation.tokens.normalise import check_finite
from jlora.system import System
from jlora.types import Tree


@dataclasses.dataclass(frozen=True)
class TokenAEConfig:
    """Hyper-parameters."""

    latent: int = 32  # L, latent numbers per token
    width: int = 256  # hidden size of the MLPs
    depth: int = 2  # residual blocks in the encoder, and in the decoder
    embed: int = 32  # size of the site embedding
    input_noise: float = 1e-3  # deviation of the noise on normalised tokens
    latent_noise: float = 0.1  # deviation of the noise on latents
    delta_weight: float = 1.0  # weight of the relative delta error
    cos_weight: float = 1.0  # weight of 1 - cos
    mse_weight: float = 1.0  # weight of the mean square token error
    floor: float = 1e-3  # share of the mean delta energy added to denominators
    steps: int = 2000  # training steps
    batch: int = 64  # adapters per step
    chunk: int = 100  # steps in one jitted scan
    learning_rate: float = 1e-3  # peak, after a warm-up of 5 %, then cosine to zero
    weight_decay: float = 1e-4  # AdamW


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenAEState:
    """A fitted codec."""

    params: Tree  # parameters of `TokenAE`
    mean: Array  # [T, L] of the raw latents of the training set
    scale: Array  # [T, L] their standard deviation
    dim: int = dataclasses.field(metadata={"static": True})  # D
    config: TokenAEConfig = dataclasses.field(metadata={"static": True})


class Trunk(nn.Module):
    """Input map, FiLM and residual blocks; tokens [T, in] and embeddings [T, E] -> [T, width]."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Array, site: Array) -> Array:
        film = nn.Dense(2 * self.width * (self.depth + 1), name="film")(site)
        film = film.reshape(site.shape[0], self.depth + 1, 2, self.width)
        h = nn.Dense(self.width, name="in")(x)
        h = h * (1 + film[:, 0, 0]) + film[:, 0, 1]
        for i in range(self.depth):
            u = nn.LayerNorm(use_bias=False, use_scale=False, name=f"norm_{i}")(h)
            u = u * (1 + film[:, i + 1, 0]) + film[:, i + 1, 1]
            u = nn.gelu(nn.Dense(self.width, name=f"up_{i}")(u))
            h = h + nn.Dense(self.width, name=f"down_{i}")(u)
        return h


class TokenAE(nn.Module):
    """Encoder and decoder for one adapter's tokens."""

    config: TokenAEConfig
    length: int  # T
    dim: int  # D

    def setup(self) -> None:
        c = self.config
        shape = (self.length, c.embed)
        self.site = self.param("site", nn.initializers.normal(1.0), shape)
        self.enc, self.dec = Trunk(c.width, c.depth), Trunk(c.width, c.depth)
        self.to_latent, self.to_token = nn.Dense(c.latent), nn.Dense(self.dim)

    def encode(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        """Raw latents of one adapter.

        Args:
          x: its normalised tokens.

        Returns:
          [T, L], in the ball |z|^2 < L.
        """
        u = self.to_latent(self.enc(x, self.site))
        return u * jax.lax.rsqrt(1 + jnp.mean(u * u, axis=1, keepdims=True))

    def decode(self, z: Float[Array, "T L"]) -> Float[Array, "T D"]:
        """Tokens of raw latents.

        Args:
          z: latents of one adapter.

        Returns:
          [T, D], normalised.
        """
        return self.to_token(self.dec(z, self.site))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.decode(self.encode(x))


def init(key: PRNGKeyArray, config: TokenAEConfig, length: int, dim: int) -> TokenAEState:
    """An untrained codec; also the template to restore one into.

    Args:
      key: of the parameters.
      config: hyper-parameters.
      length: T, tokens of an adapter.
      dim: D, numbers of a token.

    Returns:
      The state, whose latents are not standardised.
    """
    params = draw_params(key, TokenAE(config, length, dim), jnp.zeros((length, dim)))
    shape = (length, config.latent)
    return TokenAEState(params, jnp.zeros(shape), jnp.ones(shape), dim, config)


def losses(
    model: TokenAE,
    view: DeltaView | None,
    params: Tree,
    key: PRNGKeyArray,
    x: Float[Array, "b T D"],
) -> tuple[Array, dict[str, Array]]:
    """The loss described above.

    Args:
      model: the autoencoder, unbound.
      view: how tokens become deltas; None: tokens are taken for deltas.
      params: of the model.
      key: of the noise.
      x: a batch of normalised tokens.

    Returns:
      The loss, and its parts by name.
    """
    c = model.config
    k_in, k_latent = jax.random.split(key)
    noisy = x + c.input_noise * jax.random.normal(k_in, x.shape, x.dtype)
    run = model.bind({"params": params})
    z = jax.vmap(run.encode)(noisy)
    x_hat = jax.vmap(run.decode)(z + c.latent_noise * jax.random.normal(k_latent, z.shape, z.dtype))
    terms = jax.vmap(lambda p, q: delta_terms(view, p, q))(x_hat, x)
    least = c.floor * jnp.mean(terms.norm) + jnp.finfo(x.dtype).tiny
    delta = jnp.mean(terms.error / (terms.norm + least))
    cos = terms.inner * jax.lax.rsqrt(terms.norm + least) * jax.lax.rsqrt(terms.norm_hat + least)
    turn, mse = jnp.mean(1 - cos), jnp.mean(jnp.square(x_hat - x))
    total = c.delta_weight * delta + c.cos_weight * turn + c.mse_weight * mse
    return total, {"delta": delta, "one_minus_cos": turn, "mse": mse}


def _optimizer(model: TokenAE) -> optax.GradientTransformation:
    c = model.config
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, max(c.steps // 20, 1), max(c.steps, 2)
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=c.weight_decay)
    )


def fit(
    key: PRNGKeyArray,
    x: Float[Array, "n T D"],
    config: TokenAEConfig,
    *,
    view: DeltaView | None = None,
    callback: Callback | None = None,
    resume: TrainState | None = None,
) -> tuple[TokenAEState, TrainInfo]:
    """Trains the autoencoder.

    Args:
      key: PRNG key; the same key, data and config give the same codec.
      x: [n, T, D] normalised tokens of training adapters, float32.
      config: hyper-parameters.
      view: how tokens become deltas; None: tokens are taken for deltas.
      callback: called after each chunk with the training state and the chunk's metrics.
      resume: a training state that a callback saved, or `info.train`.

    Returns:
      (state, info) with info.train to go on from and info.history of the losses.

    Raises:
      ValueError: values that are not finite, or steps, batch, chunk < 1.
      FloatingPointError: the loss is not finite.
    """
    check_finite(x)
    k_init, k_train = jax.random.split(key)
    state = init(k_init, config, *x.shape[1:])
    model = TokenAE(config, *x.shape[1:])
    info = train(
        Problem(model, losses, _optimizer),
        state.params,
        x,
        k_train,
        steps=config.steps,
        batch=config.batch,
        chunk=config.chunk,
        view=view,
        callback=callback,
        resume=resume,
    )
    params = info.train.params
    z = jax.jit(jax.vmap(model.bind({"params": params}).encode))(x)
    mean, scale = jnp.mean(z, axis=0), jnp.std(z, axis=0)
    # A coordinate the encoder does not use must not pass for one at unit scale.
    scale = jnp.maximum(scale, 1e-2 * jnp.max(scale, axis=1, keepdims=True))
    scale = jnp.where(scale > 1e-5, scale, jnp.ones_like(scale))
    return TokenAEState(params, mean, scale, state.dim, config), info


def _bound(state: TokenAEState) -> TokenAE:
    model = TokenAE(state.config, state.mean.shape[0], state.dim)
    return model.bind({"params": state.params})


def encode(state: TokenAEState, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
    """Latents of one adapter.

    Args:
      state: of `fit`.
      x: its normalised tokens.

    Returns:
      [T, L], at about unit scale.
    """
    return (_bound(state).encode(x) - state.mean) / state.scale


def decode(state: TokenAEState, z: Float[Array, "T L"]) -> Float[Array, "T D"]:
    """Tokens of one adapter.

    Args:
      state: of `fit`.
      z: its latents.

    Returns:
      [T, D], normalised.
    """
    return _bound(state).decode(z * state.scale + state.mean)


SYSTEM = System(
    name="Token autoencoder",
    paper="after LoRAGen, ICLR 2026",
    symbol="TokenAE",
    evidence="learns; loss by numpy; unit latents",
    kind="component",
)
