"""Writes third_party/bitsandbytes: a tiny Llama that bitsandbytes has quantised to LLM.int8.

Needs bitsandbytes, which the tests do not: `pip install bitsandbytes==0.50.2` alongside the test
dependencies, then `python tests/golden/make_bitsandbytes.py`.
"""

import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2] / "third_party"


def main(target: Path) -> None:
    """The quantised model, and what bitsandbytes says that its weights are."""
    how = BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(
        ROOT / "peft/llama/base", quantization_config=how, dtype=torch.float16
    )
    model.save_pretrained(target)
    (target / "generation_config.json").unlink()
    tensors = load_file(target / "model.safetensors")
    values = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind == "SCB":
            codes = tensors[f"{module}.weight"]
            found = bnb.functional.int8_vectorwise_dequant(codes, tensors[name])
            values[f"{module}.weight"] = found.float().contiguous()
    save_file(values, target / "dequantised.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bitsandbytes/llama_int8")
