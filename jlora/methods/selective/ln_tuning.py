"""LN tuning: the gains and biases of normalisation layers are trained, and nothing else.

Symbols: a gain or bias w [n] of a LayerNorm or RMSNorm; its trained copy -> `v` [n].

.. math::
    w' = v

Init: v = w, hence the identity. A site is one vector of the parameters, so gain and bias are two.

Zhao et al., `Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning
<https://arxiv.org/abs/2312.11420>`_, 2023.

Source: paper; PEFT 0.21 (`LNTuningConfig`), whose files have the whole vectors, no differences.
Deviates: PEFT copies whole modules; here a pattern can select the gains alone.
"""

import dataclasses
from typing import ClassVar

import jax
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class LNTuning(Method):
    """Trainable `v` [n], the new gain or bias of a normalisation layer."""

    vectors: ClassVar[bool] = True

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """v [n], the base's.

        Raises:
          ValueError: the leaf is no vector.
        """
        if "i" in site.kinds:
            raise ValueError(
                f"{site.path}: LNTuning trains vectors; got a matrix [{site.d_in}, {site.d_out}]"
            )
        return {"v": context.weight()[0]}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """v for w, [1, n]."""
        return p["v"][None, :]


SYSTEM = System(
    name="LNTuning",
    paper="Zhao 2023, 2312.11420",
    symbol="LNTuning",
    evidence="torch PEFT's outputs to 1e-5, its files back bitwise",
    examples=(LNTuning(),),
    breaks={"L10": "a vector may meet any operation, so that none is refused"},
)
