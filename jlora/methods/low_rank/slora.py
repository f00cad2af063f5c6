r"""SLoRA: LoRA with a trained square matrix between its factors, the form that NLoRA starts in.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]
A, B               `a` [d_in, r], `b` [r, d_out], trained
N                  `core` [r, r], trained
s                  `scale`: alpha / r
=================  ===========================================================

.. math:: W' = W + s \, A N B

A ~ uniform in :math:`\pm 1 / \sqrt{d_{in}}` and N in :math:`\pm 1 / \sqrt r` (Kaiming, a = sqrt 5);
B = 0, hence the identity. N must not be 0: then no gradient reaches A or B. `jlora.inits.nlora`
sets A, N and B from parts of the weight. With A and B frozen it is the form of `LoRAXS`.

Paper: Guo et al. 2025, NLoRA, arXiv:2502.14482.
Source: paper; the draws are those of the official code.
Deviates: nothing.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class SLoRA(Method):
    """Adapter of two thin matrices and a square one between them.

    Raises:
      ValueError: rank < 1.
    """

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)

    def __post_init__(self) -> None:
        check_whole("SLoRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_in, r], core [r, r], b [r, d_out] = 0; frozen scale []."""
        r, dtype = self.rank, site.param_dtype
        for_a, for_core = jax.random.split(key)
        bound, inner = 1 / math.sqrt(site.d_in), 1 / math.sqrt(r)
        trainable = {
            "a": jax.random.uniform(for_a, (site.d_in, r), dtype, -bound, bound),
            "core": jax.random.uniform(for_core, (r, r), dtype, -inner, inner),
            "b": jnp.zeros((r, site.d_out), dtype),
        }
        return trainable, {"scale": jnp.asarray(self.alpha / r, jnp.float32)}

    def factors(self, p: Arrays) -> tuple[Array, Array]:
        """u [d_in, r] = s A N, v [r, d_out] = B."""
        return numerics.matmul(p["a"], p["scale"] * p["core"]), p["b"]


SYSTEM = System(
    name="SLoRA",
    paper="Guo 2025, 2502.14482",
    symbol="SLoRA",
    evidence="W + s A N B against numpy; with a core of the identity, LoRA",
    kind="component",
    examples=(SLoRA(rank=2, alpha=3.0),),
)
