"""Quantised leaves: the frozen base in 8 or 4 bits, in blocks of the last axis.

=====  ====================================================================
w      the weight [..., n]
q      `codes` int8 [..., n / block, block], two 4-bit codes a byte
s      `scale` float32 [..., n / block, 1]
=====  ====================================================================

.. math:: s = \\max_{block} |w| / (2^{bits - 1} - 1), \\qquad q = \\mathrm{round}(w / s),
   \\qquad \\hat w = s q

Stacks are sliced while quantised, so inside a scan one layer at a time is made dense.

Paper: Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (a quantised frozen base under an adapter).
Deviates: uniform levels and one level of scales, where the paper has NF4 and doubly quantised ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.types import Dynamic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A leaf of parameters that `lift` and `merge` see as the dense weight."""

    codes: jax.Array  # int8 [..., blocks, block], or uint8 [..., blocks, block / 2]
    scale: jax.Array  # float32 [..., blocks, 1]
    dtype: Dynamic = dataclasses.field(metadata={"static": True})  # of the dense weight
    bits: int = dataclasses.field(metadata={"static": True})  # 8 or 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        *lead, blocks, block = self.codes.shape
        return (*lead, blocks * block * (8 // self.bits))

    @property
    def ndim(self) -> int:
        """Of the dense weight."""
        return self.codes.ndim - 1

    def dequantize(self) -> jax.Array:
        """The dense weight.

        Returns:
          [..., n], of `dtype`.
        """
        codes = self.codes
        if self.bits == 4:
            pair = jnp.stack([codes & 15, codes >> 4], axis=-1).astype(jnp.int8) - jnp.int8(8)
            codes = pair.reshape(*codes.shape[:-1], -1)
        dense = codes.astype(jnp.float32) * self.scale
        return dense.reshape(self.shape).astype(self.dtype)


def quantize(w: Float[Array, "... n"], bits: int = 8, block: int = 64) -> Quantized:
    """A weight in blocks of its last axis, symmetric around zero.

    Args:
      w: the weight.
      bits: 8, which loses little, or 4.
      block: numbers that share a scale, an even divisor of n; 64, as in QLoRA.

    Returns:
      A leaf for parameters.

    Raises:
      ValueError: bits other than 8 and 4, or a block that does not divide n or is odd.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits: got {bits}, expected 8 or 4")
    if w.shape[-1] % block or block % 2:
        raise ValueError(f"block: got {block}, expected an even divisor of {w.shape[-1]}")
    top = 2 ** (bits - 1) - 1
    blocks = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / top
    codes = jnp.round(blocks / jnp.where(scale == 0, 1.0, scale)).astype(jnp.int8)
    if bits == 4:
        pair = (codes + jnp.int8(8)).astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
        codes = pair[..., 0] | (pair[..., 1] << 4)
    return Quantized(codes, scale, jnp.dtype(w.dtype), bits)
