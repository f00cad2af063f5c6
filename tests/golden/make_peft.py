"""Writes third_party/peft: adapters made by the real PEFT, with what they compute.

Run by a developer where torch, transformers and peft are installed:

    PYTHONHASHSEED=0 python tests/golden/make_peft.py [--out third_party/peft]

For two tiny random models, BERT and Llama: the model in transformers' format, its inputs and, by
adapter, PEFT's directory plus `expected.safetensors`, the hidden states [2, 6, 16] (BERT) or logits
[2, 6, 32] (Llama) that PEFT computes. The third, `conv`, is three convolutions, its weights and
inputs in `base.safetensors`, its output [2, 5]. The fourth, `experts`, has bare parameters. The
fifth, `lycoris`, has wider convolutions, one of them grouped, for LoKr and for LoHa's cores; its
output is [2, 10].
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
import transformers

BATCH, TOKENS, WIDTH, VOCAB = 2, 6, 16, 32
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
    "initializer_range": 0.2,
}
BERT_ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
LLAMA_ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def configs(targets: list[str]) -> dict[str, peft.PeftConfig]:
    """Adapters that are made for both models; `targets` are leaf names."""
    few, one = targets[:3:2], targets[0]
    return {
        "lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=few),
        "lora_all": peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets),
        "lora_rslora": peft.LoraConfig(r=3, lora_alpha=4, use_rslora=True, target_modules=few),
        "lora_layers": peft.LoraConfig(r=2, target_modules=few, layers_to_transform=[0, 2]),
        "dora": peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=few),
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=few),
        "lokr": peft.LoKrConfig(r=8, alpha=4, target_modules=few),
        "lokr_factored": peft.LoKrConfig(
            r=1, alpha=2, decompose_both=True, decompose_factor=4, target_modules=few
        ),
        "vera": peft.VeraConfig(r=4, target_modules=[one]),
        "oft": peft.OFTConfig(oft_block_size=4, target_modules=few),
        "boft": peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=few),
        "ia3": peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:]),
        "adalora": peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=6, total_step=10, target_modules=few
        ),
        "hira": peft.HiraConfig(r=2, target_modules=few),
    }


def bert_configs() -> dict[str, peft.PeftConfig]:
    """Adapters that differ in what only one model needs to show."""
    return configs(BERT_ALL) | {
        "lora_patterns": peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["query", "value"],
            rank_pattern={r"layer\.1\.attention\.self\.query": 5, "layer.0.*value": 1},
            alpha_pattern={"query": 7},
        ),
        "lora_exclude": peft.LoraConfig(
            r=2,
            target_modules=r"encoder\.layer\.\d\.attention.*\.(query|key|dense)",
            exclude_modules=["layer.1.attention.self.key"],
        ),
        "lora_linear": peft.LoraConfig(
            r=1, target_modules="all-linear", exclude_modules=r"pooler\..*"
        ),
        "lora_gaussian": peft.LoraConfig(
            r=2, target_modules=["key"], init_lora_weights="gaussian", lora_dropout=0.1
        ),
        "lora_bias": peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only"),
        "lora_pissa": peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"),
        "lora_embedding": peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"]),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"),
    }


# Made after the others, whose noise is numbered.
LATER: dict[str, dict[str, peft.PeftConfig]] = {
    "llama": {
        "lora_replicated": peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 2], [1, 3]]
        ),
        "lora_tokens": peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 1, 4]}
        ),
        "lora_saved": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    },
    "bert": {
        "lora_bias_all": peft.LoraConfig(r=2, target_modules=["query"], bias="all"),
        "dora_rslora": peft.LoraConfig(
            r=2, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=["query"]
        ),
        "adalora_pruned": peft.AdaLoraConfig(
            init_r=4,
            target_r=2,
            lora_alpha=6,
            total_step=4,
            tinit=1,
            tfinal=1,
            target_modules=["query", "value"],
        ),
    },
}


def models() -> dict[str, tuple[torch.nn.Module, dict[str, peft.PeftConfig]]]:
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False)
    shape = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
    llama = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        for model in (bert, llama):
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name.lower():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return {"bert": (bert, bert_configs()), "llama": (llama, configs(LLAMA_ALL))}


class Convolutions(torch.nn.Module):
    """Two-dimensional (window not square, strided), then one- and three-dimensional.

    None is dilated: PEFT's factors forget the dilation and fail.
    """

    def __init__(self):
        super().__init__()
        self.two = torch.nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0))
        self.one = torch.nn.Conv1d(4, 6, 3)
        self.three = torch.nn.Conv3d(2, 5, (2, 1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.two(x)).flatten(2)  # [2, 3, 7, 8] -> [2, 4, 7 * 4]
        h = torch.tanh(self.one(h))  # [2, 6, 26]
        return self.three(h.reshape(2, 2, 3, 2, 13)).mean((2, 3, 4))  # [2, 5]


def conv_configs() -> dict[str, peft.PeftConfig]:
    every = ["one", "two", "three"]
    return {
        "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=every),
        "dora": peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=every),
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["one", "two"]),
    }


class Wide(torch.nn.Module):
    """Convolutions of which LoKr has more than one form, and a matrix."""

    def __init__(self):
        super().__init__()
        self.two = torch.nn.Conv2d(8, 18, (3, 2), stride=(1, 2), padding=(1, 0))
        self.point = torch.nn.Conv2d(18, 12, 1)
        self.grouped = torch.nn.Conv2d(12, 8, (2, 2), groups=2, dilation=(2, 1))
        self.one = torch.nn.Conv1d(8, 18, 3)
        self.head = torch.nn.Linear(18, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.two(x))  # [2, 8, 5, 6] -> [2, 18, 5, 3]
        h = torch.tanh(self.grouped(torch.tanh(self.point(h))))  # [2, 8, 3, 2]
        return self.head(torch.tanh(self.one(h.flatten(2))).mean(2))


def wide_configs() -> dict[str, peft.PeftConfig]:
    most = ["two", "point", "grouped", "head"]
    every = [*most, "one"]
    core = {"target_modules": every, "use_effective_conv2d": True}
    return {
        "loha_core": peft.LoHaConfig(r=2, alpha=3, **core),
        "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=every),
        "lokr_both": peft.LoKrConfig(
            r=1, alpha=2, decompose_both=True, decompose_factor=4, target_modules=every
        ),
        "lokr_core": peft.LoKrConfig(r=2, alpha=3, **core),
        "lokr_core_both": peft.LoKrConfig(  # of "one" with a core of rank 1, torch.kron fails
            **{**core, "target_modules": most},
            r=1,
            alpha=2,
            decompose_both=True,
            decompose_factor=6,
        ),
        "lokr_whole": peft.LoKrConfig(r=8, alpha=3, target_modules=most),
        "lokr_whole_one": peft.LoKrConfig(r=8, alpha=3, target_modules=["one", "two"]),
    }


class Experts(torch.nn.Module):
    """Weights [E, out, in] or, `flat`, [E, in, out], which PEFT knows where it is told so."""

    def __init__(self, sizes: tuple[int, int], flat: bool, told: bool):
        super().__init__()
        self.is_transposed, self.flat = told, flat
        for name, (inner, outer) in {"up": sizes, "down": sizes[::-1]}.items():
            shape = (3, inner, outer) if flat else (3, outer, inner)
            setattr(self, name, torch.nn.Parameter(0.4 * torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec = "ebi,eio->ebo" if self.flat else "ebi,eoi->ebo"
        return torch.einsum(spec, torch.tanh(torch.einsum(spec, x, self.up)), self.down)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(5, 3, bias=False)
        self.experts = Experts((5, 7), False, False)  # as Mixtral's
        self.turned = Experts((5, 6), True, True)  # as those of gpt-oss
        self.flat = Experts((5, 4), True, False)  # as Llama 4's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(self.gate(x), dim=-1)  # [b, E]
        every = x.expand(3, *x.shape)
        y = self.experts(every) + self.turned(every) + self.flat(every)
        return x + torch.einsum("be,ebo->bo", share, y)


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def expert_configs() -> dict[str, peft.PeftConfig]:
    both = ["experts.up", "experts.down"]
    return {
        "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=both),
        "lora_layouts": peft.LoraConfig(
            r=2, target_modules=[], target_parameters=["turned.up", "flat.down", "flat.up"]
        ),
        "lora_more": peft.LoraConfig(
            r=2,
            lora_alpha=3,
            use_rslora=True,
            target_modules=["gate"],
            target_parameters=["experts.down", "layers.1.turned.up"],
            rank_pattern={"experts.down": 1},
            alpha_pattern={"turned.up": 5},
        ),
    }


def make_small(
    folder: Path, model: torch.nn.Module, x: torch.Tensor, wanted: dict[str, peft.PeftConfig]
) -> None:
    """A model that is not of transformers."""
    folder.mkdir(parents=True)
    with torch.no_grad():
        state = {"expected": model.eval()(x), "x": x, **model.state_dict()}
        safetensors.torch.save_file(state, folder / "base.safetensors")
        for number, (name, config) in enumerate(sorted(wanted.items())):
            wrapped = peft.get_peft_model(copy.deepcopy(model), config)
            randomise(wrapped, number)
            wrapped.save_pretrained(folder / name)
            (folder / name / "README.md").unlink()
            made = {"expected": wrapped.eval()(x)}
            safetensors.torch.save_file(made, folder / name / "expected.safetensors")
            os.chmod(folder / name / "adapter_model.safetensors", 0o644)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives every adapter parameter a value: fresh adapters are the identity and test nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise)


def run(model: torch.nn.Module) -> torch.Tensor:
    """Hidden states (BERT) or logits (Llama) in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**inputs())[0].contiguous()


def make(folder: Path) -> None:
    """Writes one directory a model, one below it an adapter."""
    made = models()
    for kind, (model, wanted) in made.items():
        model.save_pretrained(folder / kind / "base")
        state = {"expected": run(model), **inputs()}
        safetensors.torch.save_file(state, folder / kind / "base.safetensors")
        make_adapters(folder / kind, model, sorted(wanted.items()))
    for kind, more in LATER.items():
        make_adapters(folder / kind, made[kind][0], list(more.items()), len(made[kind][1]))


def allocate(model: Any) -> None:
    """AdaLoRA's schedule to its end, where directions are taken out for good."""
    for step in range(4):
        model.zero_grad()
        model(**inputs())[0].square().mean().backward()
        model.base_model.update_and_allocate(step)


def make_adapters(
    folder: Path,
    model: torch.nn.Module,
    wanted: list[tuple[str, peft.PeftConfig]],
    first: int = 0,
) -> None:
    for number, (name, config) in enumerate(wanted, first):
        path = folder / name
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        randomise(wrapped, number)
        if name == "adalora_pruned":
            allocate(wrapped)
        wrapped.save_pretrained(path)
        (path / "README.md").unlink()
        safetensors.torch.save_file({"expected": run(wrapped)}, path / "expected.safetensors")
        os.chmod(path / "adapter_model.safetensors", 0o644)


def metadata(folder: Path) -> None:
    """METADATA: where the files come from, and their hashes."""
    lines = [
        'name: "peft golden files"',
        'description: "Adapters of tiny random models, written by PEFT, and what they compute."',
        "content: data only, made by the script; no code and no text of PEFT",
        f"versions: peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        "script: PYTHONHASHSEED=0 python tests/golden/make_peft.py",
        "licence: Apache-2.0 (as jlora; PEFT and transformers are Apache-2.0, torch BSD-3-Clause)",
    ]
    golden.write(folder, lines, golden.everything(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("third_party/peft"))
    folder = parser.parse_args().out
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit("run with PYTHONHASHSEED=0: PEFT writes sets in hash order")
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)
    torch.manual_seed(2)
    make_small(folder / "conv", Convolutions(), torch.randn(2, 3, 7, 8), conv_configs())
    torch.manual_seed(3)
    make_small(folder / "experts", Mixture(), torch.randn(4, 5), expert_configs())
    torch.manual_seed(4)
    make_small(folder / "lycoris", Wide(), torch.randn(2, 8, 5, 6), wide_configs())
    metadata(folder)


if __name__ == "__main__":
    main()
