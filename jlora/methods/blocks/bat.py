"""BAT, block affine transformation: the first version of Bone, whose change is led by the weight.

=============  ===========================================================
W              `w`, frozen, [d_in, d_out], cut into blocks :math:`W_{pq}` of r x r
:math:`B_q`    `b` [d_out / r, r, r], trained, one block per block of outputs
=============  ===========================================================

.. math:: W'_{pq} = (I + B_q) \\, W_{pq} + B_q

The delta is a product with the weight, so it has full rank; it is undone by
:math:`W_{pq} = (I + B_q)^{-1} (W'_{pq} - B_q)`. Init: B = 0, hence the identity.

Every block of outputs wants another rotation of the inputs, which costs as much as the matmul and
the memory of d_out / r activations; so a step forms W'. Merge before serving.

Kang and Yin, `Bone: Block-Affine Adaptation of Large Language Models
<https://arxiv.org/abs/2409.15371>`_, 2024 (first version).

Source: paper; layout as PEFT 0.21 (its MiSS with `init_weights="bat"`).
Deviates: nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class BAT(Method):
    """Block-affine adapter with blocks of `block` x `block`.

    Raises:
      ValueError: block < 1; at init, a block that does not divide d_in and d_out.
    """

    block: int = 64

    def __post_init__(self) -> None:
        check_whole("BAT.block", self.block)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """b [d_out / block, block, block], zeros."""
        n = self.block
        if site.d_in % n or site.d_out % n:
            raise ValueError(
                f"{site.path}: BAT block: got {n}, expected a divisor of d_in = {site.d_in} and "
                f"d_out = {site.d_out}"
            )
        return {"b": jnp.zeros((site.d_out // n, n, n), site.param_dtype)}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """Blocks (I + B) W + B, [d_in, d_out]; exactly w while B is zero."""
        n, b = self.block, p["b"]
        blocks = w.reshape(w.shape[0] // n, n, w.shape[1] // n, n)
        turned = numerics.einsum("qij,pjqk->piqk", b, blocks)
        return w + (turned + b.transpose(1, 0, 2)[None]).reshape(w.shape)


SYSTEM = System(
    name="BAT",
    paper="Kang 2024, 2409.15371v1",
    symbol="BAT",
    evidence="full rank, undone by its inverse; outputs of torch PEFT to 1e-5",
    rows=(8,),
    tests=("tests/io/peft/types_test.py",),
    claim="bat",
    examples=(BAT(block=4),),
    breaks={"L4": "every block of outputs wants another rotation of the inputs"},
)
