r"""LaMDA: a square core between a frozen projection and one that is frozen little by little.

=============  ===========================================================
W              `w`, frozen, [d_in, d_out]
A              `a` [d_in, r], frozen
S              `core` [r, r], trained
B              `b` [r, d_out], trained; row by row frozen in the first steps by
               `jlora.optimizers.gradual_freeze`
S_0, B_0       `core0`, `b0`: frozen copies of the start, with ``start="svd"``
s              `scale`: alpha / r
=============  ===========================================================

.. math::
    W' = W + s \, (A S B - A S_0 B_0), \qquad
    A = U_r, \; S = S_0 = \Sigma_r / s, \; B = B_0 = V_r^T, \quad W = U \Sigma V^T

so that a fresh adapter is the identity. After the freeze r^2 numbers are trained. The last rows of
B, which are trained longest, go with the smallest of the r singular values.

With ``start="lora"`` A is uniform in ±1/sqrt(d_in), S is the identity and B = 0; nothing is
subtracted, and the gradient of S is zero until B has moved.

Azizi, Kundu and Pedram, `LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional
Adaptation <https://arxiv.org/abs/2406.12832>`_, 2024.

Source: abstract ("spectrally decomposed") and official code, which starts as LoRA.
Deviates: how the spectral start is scaled and what is subtracted is not in the code; it follows
PiSSA. S is the identity with ``start="lora"``, where the code draws it as a linear layer.
"""

import dataclasses
import math
from typing import Literal

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
class LaMDA(Method):
    """Low-dimensional adapter: `a` frozen, a core and `b` trained.

    Raises:
      ValueError: rank < 1, an unknown start; at init, a rank above min(d_in, d_out).
    """

    rank: int = 32
    alpha: float = dataclasses.field(default=32.0, compare=False)
    start: Literal["svd", "lora"] = "svd"

    def __post_init__(self) -> None:
        check_whole("LaMDA.rank", self.rank)
        if self.start not in ("svd", "lora"):
            raise ValueError(f"LaMDA.start: got {self.start!r}, expected 'svd' or 'lora'")
        if not self.alpha > 0:
            raise ValueError(f"LaMDA.alpha: got {self.alpha}, expected > 0")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """core [r, r], b [r, d_out]; frozen a [d_in, r], scale [], with "svd" also core0, b0."""
        limit, r, dtype = min(site.d_in, site.d_out), self.rank, site.param_dtype
        if r > limit:
            raise ValueError(f"{site.path}: LaMDA rank: got {r}, expected at most {limit}")
        scale = jnp.asarray(self.alpha / r, jnp.float32)
        if self.start == "lora":
            bound = 1 / math.sqrt(site.d_in)
            a = jax.random.uniform(key, (site.d_in, r), dtype, -bound, bound)
            moved = {"core": jnp.eye(r, dtype=dtype), "b": jnp.zeros((r, site.d_out), dtype)}
            return moved, {"a": a, "scale": scale}
        u, s, vt = numerics.svd(context.weight())
        moved = {"core": jnp.diag(s[:r] * (r / self.alpha)).astype(dtype), "b": vt[:r]}
        return moved, {"a": u[:, :r], "core0": moved["core"], "b0": moved["b"], "scale": scale}

    def factors(self, p: Arrays) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
        """u [d_in, r or 2 r] = s [A S, -A S_0], v = [B; B_0]."""
        u, v = numerics.matmul(p["a"], p["scale"] * p["core"]), p["b"]
        if self.start == "lora":
            return u, v
        u0 = numerics.matmul(p["a"], p["scale"] * p["core0"])
        return jnp.concatenate([u, -u0], axis=1), jnp.concatenate([v, p["b0"]], axis=0)


SYSTEM = System(
    name="LaMDA",
    paper="Azizi 2024, 2406.12832",
    symbol="LaMDA",
    evidence="both starts in float64; the spectral start is the principal part",
    rows=(16,),
    claim="lamda",
    examples=(LaMDA(rank=2, alpha=3.0), LaMDA(rank=3, alpha=3.0, start="lora")),
)
