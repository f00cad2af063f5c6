"""Files: PEFT's adapters and Orbax checkpoints. Refuses what it does not understand."""

from jlora.io.errors import FormatError
from jlora.io.names import NameMap, bert, llama, vit, vit4
from jlora.io.orbax import restore_adapter, save_adapter
from jlora.io.peft import load_peft, peft_extras, save_peft

__all__ = [
    "FormatError",
    "NameMap",
    "bert",
    "llama",
    "load_peft",
    "peft_extras",
    "restore_adapter",
    "save_adapter",
    "save_peft",
    "vit",
    "vit4",
]
