"""Writes third_party/lycoris: adapters made by the real LyCORIS, with what they compute.

Run by a developer where torch and lycoris-lora are installed:

    python tests/golden/make_lycoris.py [--out third_party/lycoris]

One tiny random model, its weights, inputs and output in `base.safetensors`; a file an adapter, with
its output [4, 8] beside it. METADATA says versions, command and the sha256 of every file.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import lycoris
import safetensors.torch
import torch

ADAPTERS = {
    "lora": {"algo": "lora"},
    "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr_both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = torch.nn.Linear(8, 12)
        self.down = torch.nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up_proj(x)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 8)
    state = {"x": x, "expected": model(x), **model.state_dict()}
    safetensors.torch.save_file(state, folder / "base.safetensors")
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Block"]})
    for number, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(1 + number)
        base = copy.deepcopy(model)
        options = {"linear_dim": 2, "linear_alpha": 3.0, **options}
        network = lycoris.create_lycoris(base, 1.0, **options)
        network.apply_to()
        for key, parameter in sorted(network.named_parameters()):
            if "scalar" not in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        network.save_weights(str(folder / f"{name}.safetensors"), torch.float32, {})
        made = {"expected": base.eval()(x)}
        safetensors.torch.save_file(made, folder / f"{name}.expected.safetensors")


def metadata(folder: Path) -> None:
    version = importlib.metadata.version("lycoris-lora")
    lines = [
        'name: "LyCORIS golden files"',
        'description: "Adapters of a tiny random model by LyCORIS, and what they compute."',
        "content: data only, made by the script; no code and no text of LyCORIS",
        f"versions: lycoris-lora {version}, torch {torch.__version__}",
        "script: python tests/golden/make_lycoris.py",
        "licence: Apache-2.0 (as jlora; LyCORIS is Apache-2.0, torch BSD-3-Clause)",
        "sha256:",
    ]
    for path in sorted(folder.glob("*.safetensors")):
        lines.append(f"  {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("third_party/lycoris"))
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)
    metadata(folder)


if __name__ == "__main__":
    main()
