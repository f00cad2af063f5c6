r"""Block-LoRA: the rank is cut into blocks that share one down-projection.

=============  ===========================================================
W              `w`, frozen, [d_in, d_out]
A_0            `a` [d_in, r / n], trained, shared by all blocks
B_i            `b` [n, r / n, d_out], trained, one per block
s              `scale`: alpha / r
=============  ===========================================================

.. math::
    W' = W + s \, [A_0, \dots, A_0] \begin{bmatrix} B_1 \\ \vdots \\ B_n \end{bmatrix}
    = W + s \, A_0 \sum_{i=1}^{n} B_i

so n - 1 of n products with the input are additions of small matrices: (d_in r + n d_out r) / n
numbers where LoRA has (d_in + d_out) r. Init: A_0 uniform in ±1/sqrt(d_in), B_i = 0.

All blocks get one gradient, so from equal starts they stay equal. By gradient descent the adapter
moves as LoRA of rank r / n whose B has the learning rate n times as large: what n blocks add to one
is a factor on a rate. The rank of the delta is at most r / n.

Zhou et al., `One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot
Learning <https://arxiv.org/abs/2501.16720>`_, 2025.

Source: abstract (no code or text was to be had).
Deviates: starts and scale are LoRA's; the paper's are not known.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class BlockLoRA(Method):
    """LoRA of rank `rank` in `blocks` blocks with one down-projection.

    Raises:
      ValueError: rank or blocks below 1, blocks that do not divide the rank.
    """

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    blocks: int = 2

    def __post_init__(self) -> None:
        check_whole("BlockLoRA.rank", self.rank)
        check_whole("BlockLoRA.blocks", self.blocks)
        if self.rank % self.blocks:
            raise ValueError(f"BlockLoRA.blocks: got {self.blocks}, expected a divisor of the rank "
                             f"{self.rank}")  # fmt: skip

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_in, r / n], b [n, r / n, d_out] = 0; frozen scale []."""
        part, dtype, bound = self.rank // self.blocks, site.param_dtype, 1 / math.sqrt(site.d_in)
        trainable = {
            "a": jax.random.uniform(key, (site.d_in, part), dtype, -bound, bound),
            "b": jnp.zeros((self.blocks, part, site.d_out), dtype),
        }
        return trainable, {"scale": jnp.asarray(self.alpha / self.rank, jnp.float32)}

    def factors(self, p: Arrays) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
        """u [d_in, r / n] = s A_0, v [r / n, d_out], the sum of the blocks."""
        return p["a"] * p["scale"], jnp.sum(p["b"], axis=0)


SYSTEM = System(
    name="BlockLoRA",
    paper="Zhou 2025, 2501.16720",
    symbol="BlockLoRA",
    evidence="the tiled form; steps of gradient descent equal to LoRA of rank r / n",
    rows=(14,),
    claim="block_lora",
    examples=(BlockLoRA(rank=4, alpha=6.0, blocks=2),),
)
