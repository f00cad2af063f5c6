"""BOFT: rotate the inputs of a kernel by a product of sparse orthogonal factors, a butterfly.

Symbols: block size n -> `block`; number of factors m -> `stages`; r_ik: the d_in / n blocks of
factor i, `r` [m, d_in / n, n, n]; s -> `s` [d_out]; P_i: the permutation that deals groups of n / 2
inputs, within chunks of :math:`2^i n`, first those of even number, then the others (P_0 = I).

.. math::
    Q_{ik} = \\tfrac12 (r_{ik} - r_{ik}^T), \\qquad R_{ik} = (I - Q_{ik})(I + Q_{ik})^{-1}, \\qquad
    M_i = P_i \\, \\mathrm{diag}(R_{i1}, R_{i2}, ...) \\, P_i^T

.. math::
    W' = M_{m-1} \\cdots M_1 M_0 \\, W \\, \\mathrm{diag}(s)

The rotation acts on x before the model's own matmul, s after it: no d_in x d_in matrix is formed.
Factor i mixes inputs :math:`2^{i-1} n` apart, so m factors reach what one with blocks of
:math:`2^{m-1} n` does, with fewer numbers. Init: r = 0 and s = 1, hence the identity.

Liu et al., `Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization
<https://arxiv.org/abs/2311.06243>`_, ICLR 2024.

Source: paper; side, scale and permutations as PEFT 0.21.
Deviates: the permutations are lookups, where PEFT keeps dense [m, d_in, d_in] matrices; no
multiplicative dropout of blocks.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


def butterfly_permutation(size: int, block: int, i: int) -> np.ndarray:
    """The permutation of a butterfly factor.

    Args:
      size: d_in.
      block: inputs of a block.
      i: the factor.

    Returns:
      int [size]: for each position the input that comes there.
    """
    if i == 0:
        return np.arange(size)
    groups = np.arange(size).reshape(-1, 2 ** (i + 1), block // 2)
    return np.concatenate([groups[:, 0::2], groups[:, 1::2]], axis=1).reshape(size)


@dataclasses.dataclass(frozen=True)
class BOFT(Method):
    """Butterfly-orthogonal adapter of `stages` factors with blocks of `block` inputs.

    Raises:
      ValueError: block < 2, stages < 1, an odd block with more than one stage; at init, where
        2 ** (stages - 1) * block does not divide d_in.
    """

    block: int = 4
    stages: int = 1

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"BOFT.block: expected at least 2, got {self.block}")
        if self.stages < 1:
            raise ValueError(f"BOFT.stages: expected at least 1, got {self.stages}")
        if self.stages > 1 and self.block % 2:
            raise ValueError(f"BOFT.block: expected even with {self.stages} stages: {self.block}")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """r [stages, d_in / block, block, block] = 0, s [d_out] = 1."""
        chunk = 2 ** (self.stages - 1) * self.block
        if site.d_in % chunk:
            raise ValueError(
                f"{site.path}: BOFT's 2 ** (stages - 1) * block = {chunk} expected to divide d_in, "
                f"got {site.d_in}"
            )
        shape = (self.stages, site.d_in // self.block, self.block, self.block)
        r, s = jnp.zeros(shape, site.param_dtype), jnp.ones(site.d_out, site.param_dtype)
        return {"r": r, "s": s}, {}

    def rotations(self, p: Arrays) -> jax.Array:
        """The rotations of all blocks, by Cayley's transform.

        Args:
          p: the arrays, as `prepare` returns them.

        Returns:
          [stages, d_in / block, block, block].
        """
        skew = (p["r"] - p["r"].mT) / 2
        eye = jnp.broadcast_to(jnp.eye(self.block, dtype=skew.dtype), skew.shape)
        return numerics.solve(eye + skew, eye - skew)

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """M_{m-1} ... M_0 W diag(s), [d_in, d_out]."""
        for i, blocks in enumerate(self.rotations(p)):
            order = butterfly_permutation(w.shape[0], self.block, i)
            parts = w[np.argsort(order)].reshape(-1, self.block, w.shape[1])
            w = jnp.einsum("bij,bjo->bio", blocks, parts).reshape(w.shape)[order]
        return w * p["s"][None, :]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        rotations = self.rotations(p).astype(x.dtype)
        shape = x.shape
        for i in reversed(range(self.stages)):
            order = butterfly_permutation(shape[-1], self.block, i)
            parts = x[..., np.argsort(order)].reshape(*shape[:-1], -1, self.block)
            x = jnp.einsum("...bi,bij->...bj", parts, rotations[i]).reshape(shape)[..., order]
        y = x @ w
        return y * p["s"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


SYSTEM = System(
    name="BOFT",
    paper="Liu 2024, 2311.06243",
    symbol="BOFT",
    evidence="one factor is OFT, reach doubles a stage; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    examples=(
        BOFT(block=4),
        BOFT(block=2, stages=2),
    ),
)
