"""Writes third_party/peft_types: one small adapter of every further type, made by the real PEFT.

Run by a developer where torch and peft are installed:

    PYTHONHASHSEED=0 python tests/golden/make_peft_types.py [--out third_party/peft_types]

The model is two layers of two matrices, ``layer.{i}.up`` (8 -> 12, with a bias) and
``layer.{i}.down`` (12 -> 8, without one); its weights, inputs [3, 8] and outputs [3, 8] are in
`base.safetensors`. By adapter: PEFT's directory, and the outputs in `expected.safetensors`.
METADATA says versions, command and the sha256 of every file.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import metadata as golden
import peft
import safetensors.torch
import torch

BOTH, DOWN = ["up", "down"], ["down"]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 12)
        self.down = torch.nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


def configs() -> dict[str, peft.PeftConfig]:
    """Adapters by name; the name's first word is the type."""
    return {
        "miss": peft.MissConfig(r=2, target_modules=BOTH),
        "miss_ragged": peft.MissConfig(r=5, target_modules=["up"]),
        "miss_mini": peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=BOTH),
        "miss_bat": peft.MissConfig(r=4, init_weights="bat", target_modules=BOTH),
        "hra": peft.HRAConfig(r=4, target_modules=BOTH),
        "hra_gs": peft.HRAConfig(r=2, apply_GS=True, target_modules=BOTH),
        "c3a": peft.C3AConfig(block_size=4, block_size_pattern={"down": 2}, target_modules=BOTH),
        "road": peft.RoadConfig(variant="road_1", group_size=4, target_modules=DOWN),
        "road_2": peft.RoadConfig(variant="road_2", group_size=2, target_modules=DOWN),
        "road_4": peft.RoadConfig(variant="road_4", group_size=4, target_modules=DOWN),
        "gralora": peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=BOTH),
        "gralora_hybrid": peft.GraloraConfig(r=2, hybrid_r=1, gralora_k=2, target_modules=BOTH),
        "shira": peft.ShiraConfig(r=2, random_seed=3, target_modules=BOTH),
        "super": peft.SupertuningConfig(sparsity=0.8, target_modules=BOTH),
        "super_supra": peft.SupertuningConfig(sparsity=0.9, r=2, target_modules=BOTH),
        "fourierft": peft.FourierFTConfig(
            n_frequency=9, scaling=40.0, n_frequency_pattern={"up": 14}, target_modules=BOTH
        ),
        "waveft": peft.WaveFTConfig(
            n_frequency=15, scaling=3.0, n_frequency_pattern={"down": 11}, target_modules=BOTH
        ),
        "waveft_entries": peft.WaveFTConfig(
            n_frequency=7, scaling=2.0, use_idwt=False, random_loc_seed=5, target_modules=BOTH
        ),
        "randlora": peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=BOTH),
        "randlora_sparse": peft.RandLoraConfig(
            r=3, randlora_alpha=4, sparse=True, save_projection=False, target_modules=BOTH
        ),
        "pvera": peft.PveraConfig(r=3, target_modules=BOTH),
        "pvera_seed": peft.PveraConfig(
            r=3, save_projection=False, projection_prng_key=9, target_modules=BOTH
        ),
        "peanut": peft.PeanutConfig(r=3, depth=2, act_fn="tanh", scaling=0.5, target_modules=BOTH),
        "peanut_flat": peft.PeanutConfig(r=3, act_fn="gelu", target_modules=BOTH),
        "deft": peft.DeftConfig(r=2, alpha=3, target_modules=BOTH),
        "deft_qr": peft.DeftConfig(r=2, decomposition_method="qr", target_modules=BOTH),
        "deft_para": peft.DeftConfig(r=2, para=True, target_modules=BOTH),
        "glora": peft.GloraConfig(r=2, target_modules=DOWN),
        "glora_vector": peft.GloraConfig(config_A_B="vector", target_modules=DOWN),
        "glora_constant": peft.GloraConfig(config_A_B="constant", target_modules=DOWN),
        "lora_kasa": peft.LoraConfig(
            r=2, lora_alpha=3, kasa_config=peft.KasaConfig(), target_modules=BOTH
        ),
        "tinylora": peft.TinyLoraConfig(r=2, u=5, target_modules=BOTH),
        "tinylora_half": peft.TinyLoraConfig(r=3, u=1, weight_tying=0.5, target_modules=BOTH),
        "tinylora_seed": peft.TinyLoraConfig(
            r=2, u=5, save_projection=False, projection_seed=7, target_modules=["layer.1.down"]
        ),
        "beft": peft.BeftConfig(target_modules=BOTH),
        "frod": peft.FrodConfig(sparse_rate=0.2, progressbar=False, target_modules=BOTH),
        "osf": peft.OSFConfig(effective_rank=3, rank_pattern={"down": 0.75}, target_modules=BOTH),
        "delora": peft.DeloraConfig(
            r=3, rank_pattern={"down": 2}, lambda_pattern={"up": 4}, target_modules=BOTH
        ),
    }


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives every adapter parameter a value: fresh adapters are the identity and test nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def make(folder: Path, wanted: dict[str, Any]) -> None:
    """The model, and one directory per adapter."""
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 8)
    folder.mkdir(parents=True)
    state = {"expected": model(x), "x": x, **model.state_dict()}
    safetensors.torch.save_file(state, folder / "base.safetensors")
    for name, config in wanted.items():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
        randomise(wrapped, sum(name.encode()))
        wrapped.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        made = {"expected": wrapped(x).contiguous()}
        safetensors.torch.save_file(made, folder / name / "expected.safetensors")
        os.chmod(folder / name / "adapter_model.safetensors", 0o644)


def metadata(folder: Path) -> None:
    """METADATA: where the files come from, and their hashes."""
    lines = [
        'name: "peft golden files of further types"',
        'description: "Adapters of a tiny random model, written by PEFT, and what they compute."',
        "content: data only, made by the script; no code and no text of PEFT",
        f"versions: peft {peft.__version__}, torch {torch.__version__}",
        "script: PYTHONHASHSEED=0 python tests/golden/make_peft_types.py",
        "licence: Apache-2.0 (as jlora; PEFT is Apache-2.0, torch BSD-3-Clause)",
    ]
    golden.write(folder, lines, golden.everything(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("third_party/peft_types"))
    folder = parser.parse_args().out
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit("run with PYTHONHASHSEED=0: PEFT writes sets in hash order")
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, configs())
    metadata(folder)


if __name__ == "__main__":
    main()
