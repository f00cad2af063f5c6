r"""A transformer over site tokens with adaLN-zero: the denoiser.

One example: tokens z [S, L] (one per site of the adapter), a time, and condition tokens [C, E].

.. math::
    c &= \mathrm{MLP}(\phi(t)) + \mathrm{MLP}(\mathrm{pool}(e)), \qquad
    h_0 = [\,W_e e + r \,;\, W_z z + p\,] \\
    (\gamma_1, \beta_1, g_1, \gamma_2, \beta_2, g_2) &= W_m\, \mathrm{silu}(c) + b_m \\
    h &\leftarrow h + g_1 \odot \mathrm{att}((1 + \gamma_1) \odot \mathrm{LN}(h) + \beta_1) \\
    h &\leftarrow h + g_2 \odot \mathrm{MLP}((1 + \gamma_2) \odot \mathrm{LN}(h) + \beta_2)

W_m, b_m and the output layer start at zero: a fresh block is the identity and a fresh model returns
zero. The output is read from the S site tokens alone.

Symbols: p -> ``site`` (learned, one per token: layer and module), r -> ``role`` (learned, one
per condition position), :math:`\phi` -> ``sinusoid``, e -> ``cond``, each token at unit root mean
square, or the learned ``null`` when the flag is set.
Pooling: ``concat`` joins all C tokens before the MLP, so that positions have meaning (class 0,
class 1); ``mean`` averages after the projection, for many exchangeable examples.
Shapes: z [S, L], t scalar, cond [C, E], null scalar bool -> prediction [S, L], hidden [S, width]
(the site tokens after block max(depth // 4, 1)), float32.
Raises: ValueError when width is no multiple of heads, or for an unknown pooling.
Papers: Peebles and Xie 2023 (DiT); Wang and He 2025 (which block the dispersive loss reads).
Source: papers.
Deviates: site tokens instead of image patches; condition tokens are also in the context.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jlora.generation.diffusion.guidance import Model
from jlora.system import System
from jlora.types import Tree

POOLS = ("concat", "mean")


def sinusoid(t: Float[Array, ""], width: int, period: float = 10_000.0) -> Float[Array, "width"]:
    """cos and sin of 1000 t at geometric frequencies from 1 down to 1 / period.

    Args:
      t: a time in [0, 1].
      width: of the result, even.
      period: of the slowest frequency; the usual 10,000.

    Returns:
      Cosines, then sines.
    """
    half = width // 2
    frequency = jnp.exp(-jnp.log(period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * t * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])


class Mlp(nn.Module):
    """Two layers; GELU between."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... out"]:
        x = nn.Dense(self.hidden, kernel_init=nn.initializers.xavier_uniform(), name="up")(x)
        x = nn.gelu(x)
        return nn.Dense(self.out, kernel_init=nn.initializers.xavier_uniform(), name="down")(x)


def modulation(c: Float[Array, "width"], parts: int, name: str) -> list[Float[Array, "1 width"]]:
    """Vectors from the conditioning vector, zero in a fresh model.

    Args:
      c: the conditioning vector.
      parts: how many vectors.
      name: of the layer; called in a compact module.

    Returns:
      `parts` of them.
    """
    zeros = nn.initializers.zeros_init()
    out = nn.Dense(parts * c.shape[-1], kernel_init=zeros, name=name)(nn.silu(c))
    return jnp.split(out[None], parts, axis=-1)


def norm(x: Float[Array, "T width"]) -> Float[Array, "T width"]:
    """Layer norm without parameters of its own: adaLN supplies them.

    Args:
      x: tokens.

    Returns:
      The same shape.
    """
    return nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False)(x)


class Block(nn.Module):
    """One adaLN-zero block; the second result is what a scan over blocks collects."""

    width: int
    heads: int
    ratio: int  # hidden width of the MLP over width

    @nn.compact
    def __call__(self, x: Float[Array, "T width"], c: Float[Array, "width"]):
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation(c, 6, "modulation")
        y = (1.0 + scale1) * norm(x) + shift1
        attend = nn.MultiHeadDotProductAttention(
            self.heads, kernel_init=nn.initializers.xavier_uniform(), name="attention"
        )
        x = x + gate1 * attend(y, y)
        y = (1.0 + scale2) * norm(x) + shift2
        x = x + gate2 * Mlp(self.ratio * self.width, self.width, name="mlp")(y)
        return x, x


class DiT(nn.Module):
    """The denoiser of one example; ``apply({'params': p}, z, t, cond, null)``, vmap for batches."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    ratio: int = 4  # hidden width of the MLPs over width
    pool: str = "concat"  # one of POOLS
    context: bool = True  # condition tokens stand before the site tokens

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "S L"],
        t: Float[Array, ""],
        cond: Float[Array, "C E"],
        null: Bool[Array, ""] | bool = False,
    ) -> tuple[Float[Array, "S L"], Float[Array, "S width"]]:
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"DiT.width: got {self.width}, expected an even multiple of heads={self.heads}"
            )
        if self.pool not in POOLS:
            raise ValueError(f"DiT.pool: got {self.pool!r}, expected one of {POOLS}")
        small = nn.initializers.normal(0.02)
        xavier = nn.initializers.xavier_uniform()

        unit = nn.RMSNorm(epsilon=1e-6, use_scale=False)(cond)
        missing = self.param("null", small, cond.shape)
        unit = jnp.where(null, missing, unit)
        words = nn.Dense(self.width, kernel_init=xavier, name="condition")(unit)
        words = words + self.param("role", small, words.shape)
        pooled = unit.reshape(-1) if self.pool == "concat" else jnp.mean(words, axis=0)
        c = Mlp(self.width, self.width, name="pool")(pooled)
        c = c + Mlp(self.width, self.width, name="time")(sinusoid(t, self.width))

        tokens = nn.Dense(self.width, kernel_init=xavier, name="tokens")(z)
        tokens = tokens + self.param("site", small, tokens.shape)
        x = jnp.concatenate([words, tokens]) if self.context else tokens
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.depth,
        )
        x, states = blocks(self.width, self.heads, self.ratio, name="blocks")(x, c)

        scale, shift = modulation(c, 2, "last_modulation")
        x = (1.0 + scale) * norm(x[-z.shape[0] :]) + shift
        zeros = nn.initializers.zeros_init()
        out = nn.Dense(z.shape[-1], kernel_init=zeros, name="out")(x)
        return out, states[max(self.depth // 4, 1) - 1, -z.shape[0] :]


def init(
    model: nn.Module,
    key: PRNGKeyArray,
    latent: tuple[int, int],
    condition: tuple[int, int],
) -> dict[str, Tree]:
    """Parameters of a denoiser.

    Args:
      model: `DiT` or `UNet1d`.
      key: of the parameters.
      latent: (S, L).
      condition: (C, E).

    Returns:
      The tree of parameters, float32.
    """
    z, cond = jnp.zeros(latent, jnp.float32), jnp.zeros(condition, jnp.float32)
    return _init(model, key, z, jnp.asarray(0.5, jnp.float32), cond, jnp.asarray(False))["params"]


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, *args: Array) -> Tree:
    return model.init(*args)


def bind(model: nn.Module) -> Model:
    """The model as a function.

    Args:
      model: `DiT` or `UNet1d`.

    Returns:
      (params, z, t, cond, null) -> (prediction, hidden).
    """
    return lambda params, z, t, cond, null: model.apply({"params": params}, z, t, cond, null)


SYSTEM = System(
    name="DiT over site tokens",
    paper="Peebles 2023, 2212.09748",
    symbol="DiT",
    evidence="forward against the docstring; identity at init; symmetries",
    kind="component",
)
