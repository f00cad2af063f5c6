"""GraLoRA: the weight is cut into k x k blocks, each with a low-rank delta of its own.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out], in k x k blocks
A, B               `a` [k, d_in / k, r], `b` [k, r, d_out / k], trained
s                  `scale`: alpha / (r + h)
:math:`A_g, B_g`   `a_all` [d_in, h], `b_all` [h, d_out], of the whole matrix, with `hybrid` = h
=================  ===========================================================

The r columns of A and the r rows of B are cut into k parts of r / k. Part m of the n-th A and part
n of the m-th B make the block from inputs n to outputs m:

.. math:: \\Delta W_{nm} = s \\, A_n^{(m)} B_m^{(n)} \\quad (+\\; s\\, A_g B_g)

With the parameters and operations of LoRA of rank r, the delta has rank up to k r. With k = 1 it is
LoRA. Init: A uniform in ±sqrt(k / d_in), B = 0, hence the identity.

Jung et al., `GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning
<https://arxiv.org/abs/2505.20355>`_, 2025.

Source: paper; layout and scale as PEFT 0.21.
Deviates: nothing.
"""

import dataclasses
import math
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
class GraLoRA(Method):
    """Block-wise LoRA on a grid of `blocks` x `blocks`.

    Raises:
      ValueError: rank or blocks < 1, hybrid < 0, a rank that `blocks` does not divide; at init, a
        d_in or d_out that it does not divide.
    """

    rank: int = 32
    alpha: float = dataclasses.field(default=64.0, compare=False)
    blocks: int = 2
    hybrid: int = 0

    def __post_init__(self) -> None:
        check_whole("GraLoRA.rank", self.rank)
        check_whole("GraLoRA.blocks", self.blocks)
        check_whole("GraLoRA.hybrid", self.hybrid, 0)
        if self.rank % self.blocks:
            raise ValueError(
                f"GraLoRA.rank: got {self.rank}, expected a multiple of blocks = {self.blocks}"
            )

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a, b = 0, and with `hybrid` a_all, b_all = 0; frozen scale []."""
        k, dtype, keys = self.blocks, site.param_dtype, jax.random.split(key)
        for name, size in (("d_in", site.d_in), ("d_out", site.d_out)):
            if size % k:
                raise ValueError(
                    f"{site.path}: GraLoRA blocks: got {k}, expected a divisor of {name} = {size}"
                )
        bound = math.sqrt(k / site.d_in)
        p = {
            "a": jax.random.uniform(keys[0], (k, site.d_in // k, self.rank), dtype, -bound, bound),
            "b": jnp.zeros((k, self.rank, site.d_out // k), dtype),
        }
        if self.hybrid:
            bound = 1 / math.sqrt(site.d_in)
            shape = (site.d_in, self.hybrid)
            p["a_all"] = jax.random.uniform(keys[1], shape, dtype, -bound, bound)
            p["b_all"] = jnp.zeros((self.hybrid, site.d_out), dtype)
        return p, {"scale": jnp.asarray(self.alpha / (self.rank + self.hybrid), jnp.float32)}

    def parts(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """a [n, i, m, r / k] with the scale, b [m, n, r / k, o].

        Args:
          p: the arrays, as `prepare` returns them.

        Returns:
          The factors of all blocks.
        """
        k = self.blocks
        a, b = p["a"] * p["scale"], p["b"]
        return a.reshape(k, a.shape[1], k, -1), b.reshape(k, k, -1, b.shape[2])

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w plus the delta of every block, [d_in, d_out]."""
        w = w + jnp.einsum("nims,mnso->nimo", *self.parts(p)).reshape(w.shape)
        return w + p["scale"] * (p["a_all"] @ p["b_all"]) if self.hybrid else w

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        y = x @ w
        if self.hybrid:
            y = y + low_rank(x, p["scale"] * p["a_all"], p["b_all"]).astype(y.dtype)
        a, b = (t.astype(x.dtype) for t in self.parts(p))
        blocks = x.reshape(*x.shape[:-1], self.blocks, -1)
        inner = jnp.einsum("...ni,nims->...nms", blocks, a)
        return y + jnp.einsum("...nms,mnso->...mo", inner, b).reshape(y.shape).astype(y.dtype)


SYSTEM = System(
    name="GraLoRA",
    paper="Jung 2025, 2505.20355",
    symbol="GraLoRA",
    evidence="LoRA with one block, k times its rank with k; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    claim="gralora",
    examples=(GraLoRA(rank=4, alpha=6.0, hybrid=1),),
)
