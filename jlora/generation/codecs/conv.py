r"""The 1-D convolutional autoencoder of Cond P-Diff over the flattened adapter.

The K = T D numbers are padded with zeros to N = 5^m (floor(K / 5^m) + 1), m blocks. Block i of the
encoder, and of the decoder (IN: instance norm over length, no affine; k5 s1: kernel 5, stride 1):

.. math::
    \text{enc}_i:&\ \mathrm{LeakyReLU} \to \mathrm{IN} \to \mathrm{conv}_{k5\,s1\,p1}
        \to \mathrm{LeakyReLU} \to \mathrm{IN} \to \mathrm{conv}_{k5\,s5\,p0} \\
    \text{dec}_i:&\ \mathrm{LeakyReLU} \to \mathrm{IN} \to \mathrm{conv}^T_{k5\,s5\,p0}
        \to \mathrm{LeakyReLU} \to \mathrm{IN} \to \mathrm{conv}_{k5\,s1\,p4}
        \quad (p5 \text{ in the last})

without the first LeakyReLU of the encoder and with a tanh at its end. Lengths: N -> N/5^m - 1 = S
latent columns -> N + 1, cut to K. Training: x' = 0.999 x + 0.001 xi;
z' = clip(0.9 z + 0.1 zeta, -1, 1); mean square error; AdamW.

The first instance norm acts on the whole vector, so *norm and mean of an adapter are lost at the
door*: the decoder can only give back what is typical. With the paper's per-task z-scores all
adapters have about one norm, so it does not show there; with global normalisation it may.

Latents are a sequence [S, L] of S columns of L channels; `standardise` shifts and scales them to
unit variance for the denoiser (the paper uses them raw, in [-1, 1]).

Symbols: encoder channels `enc_channels`, decoder channels `dec_channels`, m their number.
Cost: with the paper's channels a forward pass is about 63,000 multiply-adds per number; on a CPU
use fewer `dec_channels`.

Source: Jin et al., "Conditional LoRA Parameter Generation", arXiv 2408.01415, and the layer list
("medium") of its released language code.
Deviates: padding of unequal tokens is part of the vector; the plateau schedule counts steps.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.generation.audit.delta_error import DeltaView
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

FOLD = 5  # kernel size and stride


@dataclasses.dataclass(frozen=True)
class ConvAEConfig:
    """Hyper-parameters; the defaults are the paper's."""

    enc_channels: tuple[int, ...] = (4, 4, 4, 4)  # out channels of each encoder block
    dec_channels: tuple[int, ...] = (4, 256, 256, 8)  # in channels of each decoder block
    input_noise: float = 1e-3  # share of noise in the input
    latent_noise: float = 0.1  # share of noise in the latent
    standardise: bool = True  # latents to unit scale; False: raw tanh outputs as in the paper
    steps: int = 10_000  # training steps (the paper's batch is its whole zoo: one step per epoch)
    batch: int = 256  # adapters per step
    chunk: int = 100  # steps in one jitted scan
    learning_rate: float = 1e-3  # AdamW
    weight_decay: float = 1e-2  # AdamW
    patience: int = 5000  # steps without a better loss before the rate is halved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvAEState:
    """A fitted codec."""

    params: Tree  # parameters of `ConvAE`
    mean: Array  # [S, L] of the raw latents of the training set (zeros if not standardised)
    scale: Array  # [L] deviation of each channel around it (ones if not standardised)
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})  # (T, D)
    config: ConvAEConfig = dataclasses.field(metadata={"static": True})


class Conv(nn.Module):
    """A convolution of kernel 5 written as matmuls, [n, c] -> [n', features].

    "same" has stride 1 and pads both ends by `pad`; "down" has stride 5 (each output sees its own
    five inputs); "up" is its transpose (each input writes five outputs). XLA's own convolution is
    about ten times slower for these shapes on a CPU.
    """

    features: int
    kind: str
    pad: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "m o"]:
        n, c = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (FOLD, c, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if self.kind == "same":
            x = jnp.pad(x, ((self.pad, self.pad), (0, 0)))
            m = x.shape[0] - FOLD + 1
            windows = jnp.concatenate([x[k : k + m] for k in range(FOLD)], axis=1)
            out = windows @ kernel.reshape(FOLD * c, self.features)
        elif self.kind == "down":
            m = n // FOLD
            out = x[: m * FOLD].reshape(m, FOLD * c) @ kernel.reshape(FOLD * c, self.features)
        else:
            out = jnp.einsum("nc,kco->nko", x, kernel).reshape(FOLD * n, self.features)
        return out + bias[None]


def instance_norm(x: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Zero mean and unit variance of each channel over the length, eps 1e-5.

    Args:
      x: n places of c channels.

    Returns:
      The same shape.
    """
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + 1e-5)


class ConvAE(nn.Module):
    """Encoder [K] -> [S, L] and decoder [S, L] -> [K] of one vector."""

    config: ConvAEConfig
    size: int  # K

    def setup(self) -> None:
        """Makes the layers.

        Raises:
          ValueError: channels that do not fit, or a vector that is too short for the blocks.
        """
        enc, dec = self.config.enc_channels, self.config.dec_channels
        if not enc or len(enc) != len(dec) or enc[-1] != dec[0]:
            raise ValueError(f"channels {enc} and {dec}: expected one number, enc[-1] == dec[0]")
        self.padded = (self.size // FOLD ** len(enc) + 1) * FOLD ** len(enc)
        if self.padded // FOLD ** len(enc) < 2:
            raise ValueError(f"{self.size} numbers are too few for {len(enc)} blocks of stride 5")
        inner = [enc[0], *enc[:-1]]  # the first convolution of a block keeps its in-channels
        self.enc_same = [Conv(c, "same", 1) for c in inner]
        self.enc_down = [Conv(c, "down") for c in enc]
        self.dec_up = [Conv(c, "up") for c in dec]
        pads = [FOLD - 1] * (len(dec) - 1) + [FOLD]
        self.dec_same = [Conv(c, "same", p) for c, p in zip([*dec[1:], 1], pads, strict=True)]

    def encode(self, x: Float[Array, "K"]) -> Float[Array, "S L"]:
        """Raw latents of one vector.

        Args:
          x: K numbers.

        Returns:
          S columns of L channels, in [-1, 1].
        """
        h = jnp.pad(x, (0, self.padded - self.size))[:, None]
        for i, (same, down) in enumerate(zip(self.enc_same, self.enc_down, strict=True)):
            h = nn.leaky_relu(h) if i else h
            h = down(instance_norm(nn.leaky_relu(same(instance_norm(h)))))
        return jnp.tanh(h)

    def decode(self, z: Float[Array, "S L"]) -> Float[Array, "K"]:
        """The vector of raw latents.

        Args:
          z: S columns of L channels.

        Returns:
          K numbers.
        """
        h = z
        for up, same in zip(self.dec_up, self.dec_same, strict=True):
            h = up(instance_norm(nn.leaky_relu(h)))
            h = same(instance_norm(nn.leaky_relu(h)))
        return h[: self.size, 0]

    def __call__(self, x: Float[Array, "K"]) -> Float[Array, "K"]:
        return self.decode(self.encode(x))


def init(key: PRNGKeyArray, config: ConvAEConfig, length: int, dim: int) -> ConvAEState:
    """An untrained codec; also the template to restore one into.

    Args:
      key: of the parameters.
      config: hyper-parameters.
      length: T, tokens of an adapter.
      dim: D, numbers of a token.

    Returns:
      The state, whose latents are not standardised.

    Raises:
      ValueError: channels that do not fit, or T D too small for the number of blocks.
    """
    model = ConvAE(config, length * dim)
    x = jnp.zeros(length * dim)
    params = draw_params(key, model, x)
    z = jax.eval_shape(lambda p: model.apply({"params": p}, x, method="encode"), params)
    return ConvAEState(params, jnp.zeros(z.shape), jnp.ones(z.shape[1]), (length, dim), config)


def losses(
    model: ConvAE, view: None, params: Tree, key: PRNGKeyArray, x: Float[Array, "b K"]
) -> tuple[Array, dict[str, Array]]:
    """Mean square error of the noisy round trip.

    Args:
      model: the autoencoder, unbound.
      view: unused.
      params: of the model.
      key: of the noise.
      x: a batch of flat adapters.

    Returns:
      The loss, and {"mse": it}.
    """
    del view
    c, (k_in, k_latent) = model.config, jax.random.split(key)
    run = model.bind({"params": params})
    z = jax.vmap(run.encode)(_blend(k_in, x, c.input_noise))
    z = jnp.clip(_blend(k_latent, z, c.latent_noise), -1, 1)
    mse = jnp.mean(jnp.square(jax.vmap(run.decode)(z) - x))
    return mse, {"mse": mse}


def _blend(key: Array, x: Array, share: float) -> Array:
    return (1 - share) * x + share * jax.random.normal(key, x.shape, x.dtype)


def _optimizer(model: ConvAE) -> optax.GradientTransformation:
    c = model.config
    return optax.chain(
        optax.adamw(c.learning_rate, weight_decay=c.weight_decay),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=c.patience, rtol=1e-4),
    )


def fit(
    key: PRNGKeyArray,
    x: Float[Array, "n T D"],
    config: ConvAEConfig,
    *,
    view: DeltaView | None = None,
    callback: Callback | None = None,
    resume: TrainState | None = None,
) -> tuple[ConvAEState, TrainInfo]:
    """Trains the autoencoder.

    Args:
      key: PRNG key.
      x: [n, T, D] normalised tokens of training adapters, float32.
      config: hyper-parameters.
      view: unused: the paper's loss is on the numbers (the protocol of codecs has it).
      callback: called after each chunk with the training state and the chunk's metrics.
      resume: a training state that a callback saved, or `info.train`.

    Returns:
      (state, info) with info.train to go on from and info.history of the losses.

    Raises:
      ValueError: values that are not finite, channels that do not fit, or T D too small for the
        number of blocks.
      FloatingPointError: the loss is not finite.
    """
    del view
    check_finite(x)
    k_init, k_train = jax.random.split(key)
    state = init(k_init, config, *x.shape[1:])
    flat = x.reshape(x.shape[0], -1)
    model = ConvAE(config, flat.shape[1])
    info = train(
        Problem(model, losses, _optimizer),
        state.params,
        flat,
        k_train,
        steps=config.steps,
        batch=config.batch,
        chunk=config.chunk,
        callback=callback,
        resume=resume,
    )
    mean, scale = state.mean, state.scale
    if config.standardise:
        # One example at a time: the zoo at once would hold n K channels numbers.
        z = _encode_all(model, info.train.params, flat)
        mean = jnp.mean(z, axis=0)
        scale = jnp.sqrt(jnp.mean(jnp.square(z - mean[None]), axis=(0, 1)))
        scale = jnp.where(scale > 1e-5, scale, jnp.ones_like(scale))
    return ConvAEState(info.train.params, mean, scale, state.shape, config), info


@functools.partial(jax.jit, static_argnames="model")
def _encode_all(model: ConvAE, params: Tree, flat: Float[Array, "n K"]) -> Float[Array, "n S L"]:
    return jax.lax.map(model.bind({"params": params}).encode, flat)


def _bound(state: ConvAEState) -> ConvAE:
    model = ConvAE(state.config, state.shape[0] * state.shape[1])
    return model.bind({"params": state.params})


def encode(state: ConvAEState, x: Float[Array, "T D"]) -> Float[Array, "S L"]:
    """Latents of one adapter.

    Args:
      state: of `fit`.
      x: its normalised tokens.

    Returns:
      [S, L], at about unit scale.
    """
    return (_bound(state).encode(x.reshape(-1)) - state.mean) / state.scale[None]


def decode(state: ConvAEState, z: Float[Array, "S L"]) -> Float[Array, "T D"]:
    """Tokens of one adapter.

    Args:
      state: of `fit`.
      z: its latents.

    Returns:
      [T, D], normalised.
    """
    return _bound(state).decode(z * state.scale[None] + state.mean).reshape(state.shape)


SYSTEM = System(
    name="Conditional P-Diff: convolutional autoencoder",
    paper="Jin 2024, 2408.01415",
    symbol="ConvAE",
    evidence="layers against torch; latent sizes of the paper; loss and noise by numpy",
    rows=(1,),
    claim="cond_pdiff",
    more_claims=("cond_pdiff_styles",),
)
