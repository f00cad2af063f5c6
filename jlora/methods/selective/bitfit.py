"""BitFit: biases are trained, alone or next to low-rank adapters of the matrices.

Symbols: a bias w [n]; its trained copy -> `v` [n].

.. math::
    w' = v

Init: v = w, hence the identity. Next to LoRA this is PEFT's ``bias="all"`` or ``"lora_only"``.

Ben Zaken et al., `BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models <https://arxiv.org/abs/2106.10199>`_, 2021.

Source: paper; PEFT 0.21 (the option `bias` of LoRA), whose files have whole biases.
Deviates: a pattern selects the biases; any vector that it matches is trained.
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
class BitFit(Method):
    """Trainable `v` [n], the new bias."""

    vectors: ClassVar[bool] = True

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """v [n], the base's.

        Raises:
          ValueError: the leaf is no vector.
        """
        if "i" in site.kinds:
            raise ValueError(
                f"{site.path}: BitFit trains vectors; got a matrix [{site.d_in}, {site.d_out}]"
            )
        return {"v": context.weight()[0]}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """v for w, [1, n]."""
        return p["v"][None, :]


SYSTEM = System(
    name="BitFit",
    paper="Ben Zaken 2021, 2106.10199",
    symbol="BitFit",
    evidence="torch PEFT's outputs of LoRA with biases to 1e-5, its files back bitwise",
    examples=(BitFit(),),
    breaks={"L10": "a vector may meet any operation, so that none is refused"},
)
