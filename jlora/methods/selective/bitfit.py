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

from jlora.methods.selective.trained_vector import ANY_USE, TrainedVector
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class BitFit(TrainedVector):
    """Trainable `v` [n], the new bias."""


SYSTEM = System(
    name="BitFit",
    paper="Ben Zaken 2021, 2106.10199",
    symbol="BitFit",
    evidence="torch PEFT's outputs of LoRA with biases to 1e-5, its files back bitwise",
    examples=(BitFit(),),
    breaks=ANY_USE,
)
