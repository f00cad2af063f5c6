"""Files: adapters of PEFT, kohya, diffusers, llama.cpp; Orbax. Refuses what is unclear."""

from jlora.io import exported as exported
from jlora.io.diffusers import load_diffusers, save_diffusers
from jlora.io.errors import FormatError
from jlora.io.gguf import GgufBase, gguf_base, load_gguf, save_gguf
from jlora.io.kohya.files import load_kohya, save_kohya
from jlora.io.lora_leaves import PackageLoRA, load_lora_leaves, lora_leaves
from jlora.io.names import NameMap
from jlora.io.orbax import restore_adapter, save_adapter
from jlora.io.peft.directory import load_peft, peft_extras, save_peft
from jlora.io.peft.replication import replicate_layers
from jlora.io.peft.table import Table
from jlora.io.peft.wrapped import invoked
from jlora.io.presets import bert, llama, vit, vit4
from jlora.io.slices import sliced
from jlora.io.stacks import easydel, gemma, keras_hub, maxtext, tunix

__all__ = [
    "FormatError",
    "GgufBase",
    "NameMap",
    "PackageLoRA",
    "Table",
    "bert",
    "easydel",
    "gemma",
    "gguf_base",
    "invoked",
    "keras_hub",
    "llama",
    "load_diffusers",
    "load_gguf",
    "load_kohya",
    "load_lora_leaves",
    "load_peft",
    "lora_leaves",
    "maxtext",
    "peft_extras",
    "replicate_layers",
    "restore_adapter",
    "save_adapter",
    "save_diffusers",
    "save_gguf",
    "save_kohya",
    "save_peft",
    "sliced",
    "tunix",
    "vit",
    "vit4",
]
