r"""Rotary position embeddings with their stretched forms.

Symbols: head width D, base :math:`\theta`, position p, factor f, context n before stretching,
wavelength :math:`\lambda_i = 2 \pi / \omega_i`.

.. math::
    \omega_i = \theta^{-2i/D}, \qquad
    x_i' = x_i \cos p\omega_i - x_{i+D/2} \sin p\omega_i, \qquad
    x_{i+D/2}' = x_{i+D/2} \cos p\omega_i + x_i \sin p\omega_i

    \text{linear: } \omega_i / f, \qquad
    \text{dynamic: } \theta \to \theta \left(\frac{f\,t}{n} - (f - 1)\right)^{D/(D-2)}
    \text{ for } t > n \text{ tokens}

    \text{llama3: } \omega_i \left((1 - s_i)/f + s_i\right), \qquad
    s_i = \operatorname{clip}\left(\frac{n/\lambda_i - l}{h - l}, 0, 1\right)

Reference: Su et al. 2021 (arXiv:2104.09864); Chen et al. 2023 (arXiv:2306.15595); Grattafiori et
    al. 2024 (arXiv:2407.21783).
Deviates: halves of a head are rotated, not neighbours, as in the published checkpoints.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jlora.models.decoder.config import Rope


def frequencies(rope: Rope, head_width: int, tokens: Int[Array, ""] | int) -> Float[Array, "half"]:
    r"""The angles per position, :math:`\omega`, float32.

    Args:
      rope: base and scaling.
      head_width: D, even.
      tokens: t, the length of the longest sequence; read by "dynamic" alone.

    Returns:
      omega, [head_width / 2].
    """
    exponent = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    theta = jnp.float32(rope.theta)
    if rope.scaling == "dynamic":
        longest = jnp.maximum(jnp.asarray(tokens, jnp.float32), float(rope.original))
        growth = rope.factor * longest / rope.original - (rope.factor - 1)
        theta = theta * growth ** (head_width / (head_width - 2))
    omega = 1.0 / theta**exponent
    if rope.scaling == "linear":
        return omega / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original * omega / (2 * jnp.pi)  # n / wavelength
        kept = jnp.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        return omega * ((1 - kept) / rope.factor + kept)
    return omega


def angles(
    rope: Rope, head_width: int, positions: Int[Array, "b t"]
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Cosine and sine of every position's angles, float32.

    Args:
      rope: base and scaling.
      head_width: D, even.
      positions: of the tokens, from 0.

    Returns:
      Cosines and sines, of D / 2 angles per position.
    """
    omega = frequencies(rope, head_width, jnp.max(positions) + 1)
    angle = positions.astype(jnp.float32)[..., None] * omega[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b t h width"], cos: Float[Array, "b t half"], sin: Float[Array, "b t half"]
) -> Float[Array, "b t h width"]:
    """Rotates every head of `x`; computed in float32, returned in the dtype of `x`.

    Args:
      x: queries or keys.
      cos: cosines of `angles`.
      sin: its sines.

    Returns:
      The rotated queries or keys.
    """
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)
