"""MiSS: one thin matrix whose rows the inputs share, the second version of Bone.

=========  ===========================================================
W          `w`, frozen, [d_in, d_out]
D          `d` [r, d_out], trained; with `mini` only its first `mini` columns, [r, mini]
=========  ===========================================================

Inputs i, i + r, i + 2 r, ... share row i mod r of D; with `mini`, outputs o, o + mini, ... share
its columns too:

.. math::
    W'_{io} = W_{io} + D_{i \\bmod r,\\, o}, \\qquad
    y = x W + \\Big(\\sum_k x_{kr:(k+1)r}\\Big) D

so the inputs are added up block by block, the last block padded with zeros where r does not divide
d_in, and meet one matrix: LoRA whose A is the identity, tiled. There is no scale. Init: D = 0,
hence the identity.

Kang and Yin, `Bone: Block-Affine Adaptation of Large Language Models
<https://arxiv.org/abs/2409.15371>`_, 2024 (from its third version on: MiSS, matrix shard sharing).

Source: paper; `mini` and the padding as PEFT 0.21.
Deviates: nothing.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class MiSS(Method):
    """Matrix shard sharing; `rank` rows, and `mini` columns that all outputs share (None: all).

    Trainable `d` [rank, d_out or mini]. The rows of the weight are taken modulo `rank`, so adapters
    of other ranks do not stack.

    Raises:
      ValueError: rank or mini < 1; at init, a rank above d_in or a `mini` that does not divide
        d_out.
    """

    rank: int = 64
    mini: int | None = None

    def __post_init__(self) -> None:
        check_whole("MiSS.rank", self.rank)
        if self.mini is not None:
            check_whole("MiSS.mini", self.mini)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """d [rank, d_out or mini], zeros."""
        if self.rank > site.d_in:
            raise ValueError(
                f"{site.path}: MiSS rank: got {self.rank}, expected at most d_in = {site.d_in}"
            )
        if self.mini is not None and site.d_out % self.mini:
            raise ValueError(
                f"{site.path}: MiSS mini: got {self.mini}, expected a divisor of d_out = "
                f"{site.d_out}"
            )
        columns = site.d_out if self.mini is None else self.mini
        return {"d": jnp.zeros((self.rank, columns), site.param_dtype)}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + D, its rows and columns repeated to [d_in, d_out]."""
        d_in, d_out = w.shape
        d = jnp.tile(p["d"], (-(-d_in // self.rank), d_out // p["d"].shape[1]))
        return w + d[:d_in]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches meet the tiled identity."""
        y, (d_in, d_out) = x @ w, w.shape
        blocks = -(-d_in // self.rank)
        d = jnp.tile(p["d"], (1, d_out // p["d"].shape[1]))
        if not isinstance(x, jax.Array):
            tiled = jnp.tile(jnp.eye(self.rank, dtype=d.dtype), (blocks, 1))[:d_in]
            return y + low_rank(x, tiled, d).astype(y.dtype)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * self.rank - d_in)])
        total = jnp.sum(x.reshape(*x.shape[:-1], blocks, self.rank), axis=-2, dtype=d.dtype)
        return y + (total.astype(y.dtype) @ d.astype(y.dtype)).astype(y.dtype)


SYSTEM = System(
    name="MiSS",
    paper="Kang 2024, 2409.15371",
    symbol="MiSS",
    evidence="equal to LoRA with a tiled identity; outputs of torch PEFT to 1e-5",
    rows=(8,),
    tests=("tests/io/peft/types_test.py",),
    claim="miss",
    examples=(MiSS(rank=5), MiSS(rank=4, mini=2)),
)
