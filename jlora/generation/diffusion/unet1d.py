r"""The denoiser of Cond P-Diff: a 1-D convolutional U-Net without down-sampling. The baseline.

One example: the condition is joined to the flat latent along its length, the time is a learned
vector of that length added to the input of every block, the way back adds the way out.

.. math::
    h_0 &= [\,c \,;\, \mathrm{vec}(z)\,] \in R^{N \times 1}, \qquad N = CE + SL \\
    h_k &= f_k(h_{k-1} + e_t), \qquad
        f = \mathrm{LeakyReLU} \circ \mathrm{InstanceNorm} \circ \mathrm{Conv}_3 \\
    u_1 &= f'_1(h_K + e_t) + h_{K-1}, \quad u_k = f'_k(u_{k-1} + e_t) + h_{K-k}, \quad
    u_K = f'_K(u_{K-1} + e_t) \\
    y &= W\,\mathrm{vec}(u_K) + b \in R^{N}, \qquad \text{the last } SL \text{ entries}

Symbols: c -> ``cond``, :math:`e_t` -> ``time`` table row round(t T), f -> ``down_k``,
f' -> ``up_k`` (widths mirrored, the last has 1 channel).
Shapes: z [S, L], t scalar, cond [C, E], null scalar bool -> prediction [S, L], hidden
[N, channels] (output of block max(2K // 4, 1)), float32.
Raises: ValueError for fewer than two widths.
Paper: Jin et al. 2024, arXiv 2408.01415.
Source: official code (structure and sizes; written from its description).
Deviates: the null condition is the zero vector (the paper has none); the order convolution, norm,
activation within a block is chosen here; t in (0, 1] stands for step round(t T). The official
training gave all examples the first one's timestep: see ``Objective.time_bug``, off here. For that
program's loss use kind ``eps`` on ``ddpm_linear`` with ``times="discrete"``.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora.system import System

WIDTH = 3  # of every convolution


class Conv(nn.Module):
    """A convolution of width 3 with zeros beyond both ends, as one matmul.

    XLA's own convolution is about ten times slower for these shapes on a CPU, and takes one core.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "N c"]) -> Float[Array, "N channels"]:
        n, c = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (WIDTH, c, self.channels))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        padded = jnp.pad(x, ((1, 1), (0, 0)))
        windows = jnp.concatenate([padded[k : k + n] for k in range(WIDTH)], axis=1)
        return windows @ kernel.reshape(WIDTH * c, self.channels) + bias[None]


class ConvBlock(nn.Module):
    """Convolution of width 3, instance norm over the length, LeakyReLU."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "N c"]) -> Float[Array, "N channels"]:
        x = Conv(self.channels, name="conv")(x)[None]
        x = nn.InstanceNorm(use_bias=False, use_scale=False, epsilon=1e-5)(x)
        return nn.leaky_relu(x[0], 0.01)


class UNet1d(nn.Module):
    """The denoiser of one example; ``apply({'params': p}, z, t, cond, null)``, vmap for batches."""

    channels: Sequence[int] = (64, 128, 256, 512)
    steps: int = 1000  # rows of the time table

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "S L"],
        t: Float[Array, ""],
        cond: Float[Array, "C E"],
        null: Bool[Array, ""] | bool = False,
    ) -> tuple[Float[Array, "S L"], Float[Array, "N channels"]]:
        if len(self.channels) < 2:
            raise ValueError(f"UNet1d.channels: got {self.channels}, expected at least two widths")
        cond = jnp.where(null, jnp.zeros_like(cond), cond)
        x = jnp.concatenate([cond.reshape(-1), z.reshape(-1)])
        length = x.shape[0]
        index = jnp.clip(jnp.round(t * self.steps).astype(jnp.int32) - 1, 0, self.steps - 1)
        time = nn.Embed(
            self.steps, length, embedding_init=nn.initializers.normal(1.0), name="time"
        )(index)[:, None]

        x = x[:, None]
        skips, states = [], []
        for k, width in enumerate(self.channels):
            x = ConvBlock(width, name=f"down_{k}")(x + time)
            skips.append(x)
            states.append(x)
        widths = (*reversed(self.channels[:-1]), 1)
        for k, width in enumerate(widths):
            x = ConvBlock(width, name=f"up_{k}")(x + time)
            if k + 1 < len(widths):
                x = x + skips[-2 - k]
            states.append(x)
        y = nn.Dense(length, name="out")(x[:, 0])
        return y[length - z.size :].reshape(z.shape), states[max(len(states) // 4, 1) - 1]


SYSTEM = System(
    name="Conditional P-Diff: 1-D convolutional U-Net",
    paper="Jin 2024, 2408.01415",
    symbol="UNet1d",
    evidence="forward against the docstring; step rows; null condition",
    rows=(1,),
    claim="cond_pdiff",
    more_claims=("cond_pdiff_styles",),
)
