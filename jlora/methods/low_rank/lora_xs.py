"""LoRA-XS: between two frozen factors of the weight's own directions, a small matrix is trained.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]
A, B               `a` [d_in, r], `b` [r, d_out], frozen
R                  `core` [r, r], trained
s                  `scale`: alpha / r
=================  ===========================================================

.. math::
    W' = W + s \\, A R B, \\qquad W = U \\Sigma V^T, \\quad A = U_r \\Sigma_r, \\quad B = V_r^T

so r^2 numbers per site, whatever the size of the weight. Init: R = 0, hence the identity; the
gradient of R is not zero there.

LoRA-SB has the same form with orthonormal A and B from the first step of full fine-tuning, and
R = the singular values of it; `LoRAXS` computes and merges it once its arrays are given.

Bałazy et al., `LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters
<https://arxiv.org/abs/2405.17604>`_, 2024; Ponkshe et al., `Initialization using Update
Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning
<https://arxiv.org/abs/2411.19557>`_, 2024 (LoRA-SB).

Source: papers.
Deviates: R starts at 0 (the paper draws it of deviation 1e-5).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class LoRAXS(Method):
    """Adapter of one trained `rank` x `rank` matrix.

    Raises:
      ValueError: rank < 1; at init, a rank above min(d_in, d_out).
    """

    rank: int = 25
    alpha: float = dataclasses.field(default=25.0, compare=False)

    def __post_init__(self) -> None:
        check_whole("LoRAXS.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """core [r, r] = 0; frozen a [d_in, r], b [r, d_out], scale []."""
        limit, r = min(site.d_in, site.d_out), self.rank
        if r > limit:
            raise ValueError(f"{site.path}: LoRAXS rank: got {r}, expected at most {limit}")
        u, s, vt = numerics.svd(context.weight())
        frozen = {"a": u[:, :r] * s[None, :r], "b": vt[:r]}
        frozen["scale"] = jnp.asarray(self.alpha / r, jnp.float32)
        return {"core": jnp.zeros((r, r), site.param_dtype)}, frozen

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] = s A R, v [r, d_out] = B."""
        return numerics.matmul(p["a"], p["scale"] * p["core"]), p["b"]


SYSTEM = System(
    name="LoRAXS",
    paper="Bałazy 2024, 2405.17604; Ponkshe 2024, 2411.19557",
    symbol="LoRAXS",
    evidence="a core of the identity adds the principal part",
    rows=(22,),
    claim="lora_xs",
    examples=(LoRAXS(rank=2, alpha=3.0),),
)
