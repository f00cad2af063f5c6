"""OFT: rotate the inputs of a kernel, block by block, by learned orthogonal matrices.

Symbols: block size n -> `block`; one skew-symmetric Q_k a block, its upper triangle (row by row) in
`q` [d_in / n, n (n - 1) / 2]; Neumann terms t -> `terms` (None: the exact inverse).

.. math::
    R_k = (I + Q_k)(I - Q_k)^{-1} \\approx I + 2 \\sum_{j=1}^{t-2} Q_k^j + Q_k^{t-1},
    \\qquad W' = \\mathrm{diag}(R_1, ..., R_{d_{in}/n}) \\, W

The rotation acts on x before the model's own matmul: y = (x R) W. With exact R all singular values
of W, and the angles between its columns, are kept. Init: Q = 0, hence the identity.

Qiu et al., `Controlling Text-to-Image Diffusion by Orthogonal Finetuning
<https://arxiv.org/abs/2306.07280>`_, 2023; Qiu et al., `OFTv2 <https://arxiv.org/abs/2506.19847>`_,
2025 (input side, Cayley-Neumann).

Source: papers; side, packing of Q and truncated series as PEFT 0.21.
Deviates: for `terms=None` PEFT computes (I - Q)(I + Q)^{-1}, the transpose of the limit of its own
series; here the series converges to the exact form, so such files have -Q in `q`. With fewer than
four terms PEFT's series differs (2: I + 2Q, 3: as 4). LyCORIS rotates the output side instead.
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


@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Block-orthogonal adapter; `share` uses one block for the whole kernel.

    Raises:
      ValueError: block or terms < 2; at init, where `block` does not divide d_in.
    """

    block: int = 32
    terms: int | None = 5
    share: bool = False

    def __post_init__(self) -> None:
        for name, got in (("block", self.block), ("terms", self.terms)):
            if got is not None and got < 2:
                raise ValueError(f"OFT.{name}: expected at least 2, got {got}")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """q [d_in / block or 1, block (block - 1) / 2], zeros."""
        if site.d_in % self.block:
            raise ValueError(
                f"{site.path}: OFT block expected to divide d_in = {site.d_in}, got {self.block}"
            )
        count = 1 if self.share else site.d_in // self.block
        return {"q": jnp.zeros((count, self.block * (self.block - 1) // 2), site.param_dtype)}, {}

    def rotations(self, p: Arrays) -> jax.Array:
        """The rotations of all blocks.

        Args:
          p: the arrays, as `prepare` returns them.

        Returns:
          [count, block, block].
        """
        n = self.block
        rows, cols = np.triu_indices(n, 1)
        upper = jnp.zeros((p["q"].shape[0], n, n), p["q"].dtype).at[:, rows, cols].set(p["q"])
        q = upper - upper.mT
        eye = jnp.broadcast_to(jnp.eye(n, dtype=q.dtype), q.shape)
        if self.terms is None:
            return numerics.solve(eye - q, eye + q)
        total, power = eye, q
        for _ in range(self.terms - 2):
            total, power = total + 2 * power, jnp.matmul(power, q, precision="highest")
        return total + power

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """diag(R) W, [d_in, d_out]."""
        blocks = w.reshape(-1, self.block, w.shape[-1])
        r = self.rotations(p)
        r = jnp.broadcast_to(r, (blocks.shape[0], *r.shape[1:]))
        return jnp.einsum("bij,bjo->bio", r, blocks).reshape(w.shape)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        r = self.rotations(p).astype(x.dtype)
        if self.share:
            turned = jnp.einsum("...bi,ij->...bj", blocks, r[0])
        else:
            turned = jnp.einsum("...bi,bij->...bj", blocks, r)
        return turned.reshape(x.shape) @ w


SYSTEM = System(
    name="OFT",
    paper="Qiu 2023, 2306.07280; Qiu 2025, 2506.19847",
    symbol="OFT",
    evidence="norms and angles kept; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    examples=(
        OFT(block=4),
        OFT(block=4, terms=None, share=True),
    ),
)
