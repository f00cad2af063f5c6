"""Writes third_party/diffusers: LoRA files made by the real diffusers, with the deltas they hold.

Run by a developer where torch, peft and diffusers are installed:

    PYTHONHASHSEED=0 python tests/golden/make_diffusers.py [--out third_party/diffusers]

One tiny random U-Net. A file an adapter, written by `save_lora_weights` with or without its
metadata, or by `save_lora_adapter`; alongside it what a U-Net into which diffusers has loaded the
file computes and what each module adds to its weight, or, with magnitudes, the weight it has then.
The weights of the modules are in `base.safetensors`. METADATA says versions, command and the
sha256 of every file, which change from run to run: safetensors writes the header's two entries in
any order.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import metadata as golden
import peft
import safetensors.torch
import torch
from peft.utils import get_peft_model_state_dict

NAME = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("told", {"r": 2, "lora_alpha": 3}),
    "patterns": (
        "told",
        {
            "r": 2,
            "lora_alpha": 4,
            "use_rslora": True,
            "rank_pattern": {"attn2.to_v": 3},
            "alpha_pattern": {"attn1.to_q": 5},
        },
    ),
    "dora": ("told", {"r": 2, "lora_alpha": 3, "use_dora": True}),
    "untold": ("untold", {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_v": 4}}),
    "bare": ("bare", {"r": 2, "lora_alpha": 3}),
}


def unet() -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    return model.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A noisy sample, its step and the states of a text encoder."""
    torch.manual_seed(1)
    return torch.randn(2, 4, 4, 4), torch.tensor(7), torch.randn(2, 3, 6)


def layers(model: torch.nn.Module) -> dict[str, Any]:
    return {k: m for k, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def loaded(folder: Path, component: str = "unet") -> diffusers.UNet2DConditionModel:
    """The U-Net with a file that diffusers reads; `component` is "" where keys have none."""
    model = unet()
    options = {"prefix": component or None, "weight_name": NAME, "adapter_name": "default"}
    model.load_lora_adapter(str(folder), **options)
    return model


def effect(layer: Any) -> torch.Tensor:
    """The delta of a layer, or its whole weight where there is a magnitude."""
    if "default" not in layer.lora_magnitude_vector:
        return layer.get_delta_weight("default")
    layer = copy.deepcopy(layer)
    layer.merge(adapter_names=["default"])
    return layer.get_base_layer().weight


def save(model: diffusers.UNet2DConditionModel, folder: Path, form: str) -> None:
    if form == "bare":
        model.save_lora_adapter(folder)
        return
    told = model.peft_config["default"].to_dict() if form == "told" else None
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=told,
    )


@torch.no_grad()
def make(folder: Path) -> None:
    base = unet()
    for number, (name, (form, options)) in enumerate(ADAPTERS.items()):
        model = copy.deepcopy(base)
        model.add_adapter(peft.LoraConfig(target_modules=TARGETS, **options))
        generator = torch.Generator().manual_seed(number)
        for key, parameter in sorted(model.named_parameters()):
            if ".lora_" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        save(model, folder / name, form)
        os.chmod(folder / name / NAME, 0o644)
        model = loaded(folder / name, "" if form == "bare" else "unet")
        made = {key: effect(layer).contiguous() for key, layer in layers(model).items()}
        made["output"] = model(*inputs()).sample
        safetensors.torch.save_file(made, folder / name / "expected.safetensors")
        if number == 0:
            weights = {k: layer.get_base_layer().weight for k, layer in layers(model).items()}
            weights["output"] = base(*inputs()).sample
            safetensors.torch.save_file(weights, folder / "base.safetensors")


def metadata(folder: Path) -> None:
    versions = {m.__name__: m.__version__ for m in (diffusers, peft, torch)}
    lines = [
        'name: "diffusers golden files"',
        'description: "LoRA files of a tiny random U-Net by diffusers, and the deltas they hold."',
        "content: data only, made by the script; no code and no text of diffusers",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "script: PYTHONHASHSEED=0 python tests/golden/make_diffusers.py",
        "licence: Apache-2.0 (as jlora; diffusers and PEFT are Apache-2.0, torch BSD-3-Clause)",
    ]
    golden.write(folder, lines, folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("third_party/diffusers"))
    folder = parser.parse_args().out
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit("run with PYTHONHASHSEED=0: PEFT writes sets in hash order")
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    metadata(folder)


if __name__ == "__main__":
    main()
