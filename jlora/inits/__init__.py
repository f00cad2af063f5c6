"""Initialisations: the values that training starts from.

Each is one call, ``name(fn, params, batches, methods={...}) -> adapter``, that selects sites as
`jl.init` does, looks at the weights or at data where it needs them, and changes no parameter. What
changes the function otherwise carries its start in frozen copies (`jl.Residual`); `fold` and
`residual_leaves` write such adapters for programs that have none. Their laws are those of
`jlora.contracts.initialisation`.
"""

from jlora.inits.corda import corda as corda
from jlora.inits.eva import eva as eva
from jlora.inits.frod import frod as frod
from jlora.inits.loftq import loftq as loftq
from jlora.inits.lora_ga import lora_ga as lora_ga
from jlora.inits.lora_sb import lora_sb as lora_sb
from jlora.inits.nlora import int_tune as int_tune
from jlora.inits.nlora import nlora as nlora
from jlora.inits.nlora import slora as slora
from jlora.inits.olora import olora as olora
from jlora.inits.pissa import pissa as pissa
from jlora.inits.pretrained import pretrained as pretrained
from jlora.inits.residual import fold as fold
from jlora.inits.residual import from_adapter as from_adapter
from jlora.inits.residual import residual_leaves as residual_leaves
from jlora.inits.residual import without_start as without_start
from jlora.inits.spectral_ranks import cut as cut
from jlora.inits.spectral_ranks import spectral_ranks as spectral_ranks
from jlora.inits.start import from_factors as from_factors

__all__ = [
    "corda",
    "cut",
    "eva",
    "fold",
    "frod",
    "from_adapter",
    "from_factors",
    "int_tune",
    "loftq",
    "lora_ga",
    "lora_sb",
    "nlora",
    "olora",
    "pissa",
    "pretrained",
    "residual_leaves",
    "slora",
    "spectral_ranks",
    "without_start",
]
