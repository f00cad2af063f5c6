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

from jlora.methods.selective.trained_vector import ANY_USE, TrainedVector
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class LNTuning(TrainedVector):
    """Trainable `v` [n], the new gain or bias of a normalisation layer."""


SYSTEM = System(
    name="LNTuning",
    paper="Zhao 2023, 2312.11420",
    symbol="LNTuning",
    evidence="torch PEFT's outputs to 1e-5, its files back bitwise",
    examples=(LNTuning(),),
    breaks=ANY_USE,
)
