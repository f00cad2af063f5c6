"""DeLoRA: a low-rank delta whose strength is one trained number and whose directions are unit.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]
A, B               `a` [d_in, r], `b` [r, d_out], trained
:math:`\\lambda`    `strength` [], trained
:math:`\\nu`        `norm` [d_in], frozen: lengths of the rows of W at the start
=================  ===========================================================

.. math::
    W' = W + \\frac{\\lambda}{r} \\, \\mathrm{diag}(\\nu) \\sum_{k=1}^{r}
    \\frac{a_k b_k^T}{\\|a_k\\| \\, \\|b_k\\|}

Lengths below 1e-4 count as 1e-4. The delta of normalised rows is bounded,
:math:`\\|\\mathrm{diag}(\\nu)^{-1} \\Delta W\\|_F \\le \\lambda`, whatever A and B do. Init: A
uniform in ±1/sqrt(d_in), B = 0, hence the identity; lambda as given.

Bini, Girrbach and Akata, `Decoupling Angles and Strength in Low-rank Adaptation
<https://arxiv.org/abs/2503.18225>`_, 2025.

Source: paper; floor of the lengths, norms per input and start as PEFT 0.21.
Deviates: nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System

FLOOR = 1e-4  # of a length


@dataclasses.dataclass(frozen=True)
class DeLoRA(Method):
    """Low-rank adapter of bounded norm; `strength` is lambda at the start.

    Trainable `a` [d_in, r], `b` [r, d_out], `strength` []; frozen `norm` [d_in] and `scale` [],
    which is 1 / r.

    Raises:
      ValueError: rank < 1.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    rank: int = 8
    strength: float = dataclasses.field(default=15.0, compare=False)

    def __post_init__(self) -> None:
        check_whole("DeLoRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        w, bound = context.weight(), 1 / math.sqrt(site.d_in)
        trainable = {
            "a": jax.random.uniform(key, (site.d_in, self.rank), w.dtype, -bound, bound),
            "b": jnp.zeros((self.rank, site.d_out), w.dtype),
            "strength": jnp.asarray(self.strength, w.dtype),
        }
        scale = jnp.asarray(1 / self.rank, jnp.float32)
        return trainable, {"norm": jnp.sqrt(jnp.sum(w * w, axis=1)), "scale": scale}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] with norms and strength, v [r, d_out]."""
        lengths = [
            jnp.sqrt(jnp.maximum(jnp.sum(p[k] ** 2, axis), FLOOR**2))
            for k, axis in (("a", 0), ("b", 1))
        ]
        gain = p["strength"] * p["scale"] / (lengths[0] * lengths[1])
        return p["norm"][:, None] * p["a"] * gain[None, :], p["b"]


SYSTEM = System(
    name="DeLoRA",
    paper="Bini 2025, 2503.18225",
    symbol="DeLoRA",
    evidence="the bound holds for any factors; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    claim="delora",
    examples=(DeLoRA(rank=2, strength=3.0),),
)
