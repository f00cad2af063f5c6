r"""Trans-LoRA to a larger base, as in the paper: adapters of MiniLM-L3 move to MiniLM-L6.

Everything else is that of the claim `trans_lora`.
"""

from experiments.claims import trans_lora
from experiments.claims import transfer_bases as bases

CLAIM = trans_lora.claim("trans_lora_larger", bases.L3, bases.L6)
