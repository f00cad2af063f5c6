"""Writes third_party/lycoris: adapters made by the real LyCORIS, with what they compute.

Run by a developer where torch and lycoris-lora are installed:

    python tests/golden/make_lycoris.py [--out third_party/lycoris]

One tiny random model, its weights, inputs and output in `base.safetensors`; a file an adapter, with
its output [4, 8] alongside it. In `conv` the same of a model with convolutions, its output [2, 10],
and alongside the output the delta of every module that LyCORIS's layer adds to its weight. METADATA
says versions, command and the sha256 of every file.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import lycoris
import metadata as golden
import safetensors.torch
import torch

LENGTHS = {"dora_wd": True, "wd_on_output": True}
BY_INPUT = {"dora_wd": True, "wd_on_output": False}
ADAPTERS = {
    "lora": {"algo": "lora"},
    "dora": {"algo": "lora", **LENGTHS},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr_both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
    "doha": {"algo": "loha", **LENGTHS},
    "dokr": {"algo": "lokr", "factor": 2, **LENGTHS},
    "dokr_whole": {"algo": "lokr", "full_matrix": True, **LENGTHS},
    "dora_in": {"algo": "lora", **BY_INPUT},
    "doha_in": {"algo": "loha", **BY_INPUT},
    "dokr_in": {"algo": "lokr", "factor": 2, **BY_INPUT},
}
WIDE = {
    "lora": {"algo": "lora"},
    "dora": {"algo": "lora", **LENGTHS},
    "loha": {"algo": "loha"},
    "loha_core": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr_core": {"algo": "lokr", "use_tucker": True},
    "lokr_core_both": {
        "algo": "lokr",
        "use_tucker": True,
        "decompose_both": True,
        "factor": 4,
        "linear_dim": 1,
    },
    "lokr_whole": {"algo": "lokr", "full_matrix": True},
    "lokr_unbalanced": {
        "algo": "lokr",
        "decompose_both": True,
        "unbalanced_factorization": True,
    },
    "lora_core": {"algo": "lora", "use_tucker": True},
    "dora_core": {"algo": "lora", "use_tucker": True, **LENGTHS},
    "doha_core": {"algo": "loha", "use_tucker": True, **LENGTHS},
    "dokr": {"algo": "lokr", **LENGTHS},
    "dokr_core": {"algo": "lokr", "use_tucker": True, **LENGTHS},
    "dora_in": {"algo": "lora", **BY_INPUT},
    "doha_in": {"algo": "loha", "use_tucker": True, **BY_INPUT},
    "dokr_in": {"algo": "lokr", **BY_INPUT},
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


class Wide(torch.nn.Module):
    """Convolutions of one to three dimensions, one grouped and dilated, and a matrix."""

    def __init__(self):
        super().__init__()
        self.two = torch.nn.Conv2d(8, 18, (3, 2), stride=(1, 2), padding=(1, 0))
        self.point = torch.nn.Conv2d(18, 12, 1)
        self.grouped = torch.nn.Conv2d(12, 8, (2, 2), groups=2, dilation=(2, 1))
        self.one = torch.nn.Conv1d(8, 24, 3)
        self.three = torch.nn.Conv3d(8, 18, (2, 1, 2))
        self.head = torch.nn.Linear(18, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.two(x))  # [2, 8, 5, 6] -> [2, 18, 5, 3]
        h = torch.tanh(self.grouped(torch.tanh(self.point(h))))  # [2, 8, 3, 2]
        h = torch.tanh(self.one(h.flatten(2)))  # [2, 24, 4]
        h = torch.tanh(self.three(h.reshape(2, 8, 3, 2, 2)))  # [2, 18, 2, 2, 1]
        return self.head(h.mean((2, 3, 4)))


def deltas(network: lycoris.LycorisNetwork) -> dict[str, torch.Tensor]:
    """What each layer adds to its weight, by name; of those with magnitudes nothing."""
    made = {}
    for layer in network.loras:
        name = layer.lora_name.removeprefix("lycoris_")
        if hasattr(layer, "get_weight"):
            made[f"delta.{name}"] = layer.get_weight(layer.shape) * layer.scalar
        elif not layer.wd:
            made[f"delta.{name}"] = layer.get_diff_weight(shape=layer.shape)[0]
    return {name: delta.contiguous() for name, delta in made.items()}


@torch.no_grad()
def make(
    folder: Path,
    model: torch.nn.Module,
    x: torch.Tensor,
    adapters: dict[str, dict[str, Any]],
    with_deltas: bool,
) -> None:
    folder.mkdir(parents=True)
    state = {"x": x, "expected": model(x), **model.state_dict()}
    safetensors.torch.save_file(state, folder / "base.safetensors")
    for number, (name, options) in enumerate(adapters.items()):
        torch.manual_seed(1 + number)
        base = copy.deepcopy(model)
        options = {"linear_dim": 2, "linear_alpha": 3.0, **options}
        network = lycoris.create_lycoris(base, 1.0, **options)
        network.apply_to()
        for key, parameter in sorted(network.named_parameters()):
            if "scalar" not in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        network.save_weights(str(folder / f"{name}.safetensors"), torch.float32, {})
        made = {"expected": base.eval()(x), **(deltas(network) if with_deltas else {})}
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
    ]
    golden.write(folder, lines, folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("third_party/lycoris"))
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    make(folder, Model(), torch.randn(4, 8), ADAPTERS, with_deltas=False)
    torch.manual_seed(5)
    make(folder / "conv", Wide(), torch.randn(2, 8, 5, 6), WIDE, with_deltas=True)
    metadata(folder)


if __name__ == "__main__":
    main()
