"""Writes third_party/mergekit: tiny models, and what the real mergekit makes of them.

Run by a developer where mergekit, torch and peft are installed:

    pip install mergekit==0.1.5
    python tests/golden/make_mergekit.py [--out third_party/mergekit]

`models`: a Llama of noise and three that differ from it, all checkpoints, and two LoRAs on it by
PEFT. `configs.json`: configurations in mergekit's format, whose models are folders of `models`.
`results`: all tensors of the merged model of each. Randomised methods take the masks of `Masks`
instead of torch's, so that another program can take the same. METADATA says versions, command and
the sha256 of every file.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.torch
import tokenizers
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

MODELS = ("a", "b", "c")
LAYERS = 3
WORDS = [f"w{k}" for k in range(16)]


def three(**parameters: Any) -> list[dict[str, Any]]:
    """The three models; of each parameter, a value for every one."""
    return [
        {"model": m, "parameters": {key: values[k] for key, values in parameters.items()}}
        for k, m in enumerate(MODELS)
    ]


def merge(method: str, models: Any, base: str | None = "base", **more: Any) -> dict[str, Any]:
    named = {"base_model": base} if base else {}
    return {"merge_method": method, "models": models, **named, **more}


BARE = [{"model": m} for m in MODELS]
SPAN = [0, LAYERS]
LORAS = [{"model": f"base+lora_{k}", "parameters": {"weight": w, "density": 0.5}}
         for k, w in (("a", 0.7), ("b", 0.4))]  # fmt: skip
HALF = {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.7, 0.3)}


def sliced(method: str, *slices: Any, base: str | None = None, **more: Any) -> dict[str, Any]:
    """Slices, each of sources (model, first layer, stop, parameters)."""

    def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
        named = {"parameters": parameters} if parameters else {}
        return {"model": model, "layer_range": [start, stop], **named}

    named = {"base_model": base} if base else {}
    made = [{"sources": [source(*s[:3], **(s[3] if s[3:] else {})) for s in one]} for one in slices]
    return {"slices": made, "merge_method": method, **named, **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "ties": merge("ties", three(
        density=([1, 0.7, 0.1], 0.5, 0.33),
        weight=(1.0, [0, 0.3, 0.7, 1], [{"filter": "mlp", "value": 0.5}, {"value": 0}]),
    ), parameters={"normalize": True, "int8_mask": True}),
    "ties_sum": merge("ties", three(**HALF), parameters={"normalize": False, "int8_mask": True}),
    "ties_base_listed": merge("ties", [{"model": "base"}, *three(weight=(0.5, 0.3, 0.4))],
                              parameters={"density": 0.4, "lambda": 0.7, "rescale": True}),
    "task_arithmetic": merge("task_arithmetic", three(weight=(0.6, -0.4, [0.1, 1.0])),
                             parameters={"lambda": 0.8}),
    "task_arithmetic_mean": merge("task_arithmetic", three(weight=(1, 2, 3)),
                                  parameters={"normalize": True}),
    "dare_ties": merge("dare_ties", three(**HALF)),
    "dare_linear": merge("dare_linear", three(**HALF), parameters={"rescale": False}),
    "della": merge("della", three(**HALF, epsilon=(0.1, 0.2, 0.15))),
    "della_linear": merge("della_linear", three(**HALF)),
    "breadcrumbs": merge("breadcrumbs", three(**HALF, gamma=(0.01, 0.1, 0.4))),
    "breadcrumbs_ties": merge("breadcrumbs_ties", three(**HALF, gamma=(0.01, 0.1, 0.4)),
                              parameters={"normalize": True}),
    "sce": merge("sce", BARE, parameters={"select_topk": 0.3}),
    "sce_all": merge("sce", BARE),
    "model_stock": merge("model_stock", BARE),
    "model_stock_rows": merge("model_stock", BARE, parameters={"filter_wise": True}),
    "slerp": {
        "slices": [{"sources": [{"model": "a", "layer_range": SPAN},
                                {"model": "b", "layer_range": SPAN}]}],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                             {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]},
    },
    "slerp_models": merge("slerp", [{"model": "other"}], "a", parameters={"t": 0.3}),
    "slices": {
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 1], "parameters": {"weight": 0.2}},
                         {"model": "b", "layer_range": [0, 1], "parameters": {"weight": 0.8}}]},
            {"sources": [{"model": "a", "layer_range": [1, 3], "parameters": {"weight": [0, 1]}},
                         {"model": "b", "layer_range": [1, 3]}],
             "parameters": {"weight": 0.5}},
        ],
        "merge_method": "linear",
    },
    # layers that move: a model of other layers, of more than one model, and of fewer
    "moved": sliced("passthrough", [("a", 0, 2)], [("b", 1, 3, {"scale": 0.5})], [("a", 2, 3)]),
    "moved_fewer": sliced("passthrough", [("a", 0, 1)], [("a", 2, 3)], dtype="bfloat16"),
    "moved_linear": sliced(
        "linear", [("a", 0, 2, {"weight": [0.2, 0.6]}), ("b", 1, 3, {"weight": 0.8})],
        [("c", 1, 2, {"weight": 1.0}), ("a", 0, 1, {"weight": 2.0})],
    ),
    "moved_slerp": sliced("slerp", [("a", 0, 2), ("b", 0, 2)], [("a", 1, 3), ("c", 0, 2)], base="a",
                          parameters={"t": [0.2, 0.9]}),
    "moved_ties": sliced(
        "ties", [("base", 0, 1), ("a", 0, 1), ("b", 0, 1)],
        [("base", 0, 2), ("a", 1, 3), ("c", 0, 2)],
        base="base", parameters={"weight": 0.5, "density": 0.6},
    ),
    "nuslerp": merge("nuslerp", three(weight=(0.4, 0.9, 0))[:2]),
    "nuslerp_rows": merge("nuslerp", [{"model": "a", "parameters": {"weight": 1}},
                                      {"model": "other", "parameters": {"weight": 2}}], None,
                          parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": merge("multislerp", three(weight=(0.5, 0.3, 0.4))),
    "multislerp_plain": merge("multislerp", three(weight=(0.5, 0.3, 0.4)), None),
    "karcher": merge("karcher", [*BARE, {"model": "other"}], None),
    "karcher_base": merge("karcher", BARE, parameters={"max_iter": 3}),
    "linear": merge("linear", three(weight=(1.0, 0.3, 0.5)), None),
    "linear_sum": merge("linear", three(weight=(1.0, -0.3, "5e-1")), None,
                        parameters={"normalize": False}),
    "linear_tokenizer": merge("linear", three(weight=(1, 1, 2)), None, tokenizer_source="union"),
    "passthrough": merge("passthrough", [{"model": "a", "parameters": {
        "scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1}]}}], None),
    "nearswap": merge("nearswap", BARE[:1], parameters={"t": 0.02}),
    "linear_bfloat16": merge("linear", three(weight=(1.0, 0.3, 0.5)), None, dtype="bfloat16"),
    "task_float16": merge("task_arithmetic", three(weight=(1.0, 0.3, 0.5)), dtype="float16",
                          out_dtype="float32"),
    "lora_ties": merge("ties", LORAS),
    "lora_karcher": merge("karcher", [{"model": m["model"]} for m in LORAS], None),
    "lora_linear_sum": merge("linear", [{"model": m["model"], "parameters": {"weight": w}}
                                        for m, w in zip(LORAS, (0.7, 0.4), strict=True)], None,
                             parameters={"normalize": False}),
}  # fmt: skip


class Masks:
    """Bernoulli masks of the model's number and the tensor's size, models one after the other."""

    def __init__(self, models: int):
        self.models, self.calls = models, 0

    def __call__(self, p: np.ndarray) -> np.ndarray:
        u = np.random.default_rng([self.calls % self.models, p.size]).random(p.size, np.float32)
        self.calls += 1
        return u.reshape(p.shape) < p


def config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, architectures=["LlamaForCausalLM"],
        dtype="float32", tie_word_embeddings=False,
    )  # fmt: skip


def noise(model: torch.nn.Module, size: float, seed: int) -> torch.nn.Module:
    """A copy with noise of heavy tails added."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=draw) ** 3
    return model


def save(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config().to_diff_dict(), indent=1))
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE({w: k for k, w in enumerate(WORDS)}, [], unk_token="w0")
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        folder
    )


def models(folder: Path) -> None:
    torch.manual_seed(0)
    base = noise(transformers.LlamaForCausalLM(config()), 0.1, 1)
    save(base, folder / "base")
    for k, name in enumerate(MODELS):
        save(noise(base, 0.03, k + 2), folder / name)
    save(noise(base, 0.5, 9), folder / "other")
    for k, name in enumerate("ab"):
        lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
        torch.manual_seed(k)
        made = peft.get_peft_model(copy.deepcopy(base), lora)
        for p in made.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.2)
        made.save_pretrained(folder / f"lora_{name}")
        (folder / f"lora_{name}" / "README.md").unlink(missing_ok=True)


def placed(data: Any, folder: Path) -> Any:
    """A configuration whose models are in a folder."""
    if isinstance(data, dict):
        return {
            k: "+".join(str(folder / m) for m in v.split("+"))
            if k in ("model", "base_model")
            else placed(v, folder)
            for k, v in data.items()
        }
    return [placed(v, folder) for v in data] if isinstance(data, list) else data


def result(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a merge by mergekit."""
    data = placed(CONFIGS[name], folder)
    masks, real = Masks(len(data.get("models", ()))), torch.bernoulli
    torch.bernoulli = lambda p: torch.from_numpy(masks(p.numpy()).astype(np.float32))
    try:
        with tempfile.TemporaryDirectory() as out:
            options = MergeOptions(
                lora_merge_cache=str(Path(out) / "loras"),
                write_model_card=False,
                quiet=True,
                device="cpu",
            )
            run_merge(MergeConfiguration.model_validate(data), f"{out}/merged", options)
            found = {}
            for file in sorted(Path(out, "merged").glob("*.safetensors")):
                found |= safetensors.torch.load_file(file)
            return {k: found[k].clone() for k in sorted(found)}
    finally:
        torch.bernoulli = real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("third_party/mergekit"))
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    models(out / "models")
    (out / "results").mkdir()
    (out / "configs.json").write_text(json.dumps(CONFIGS, indent=1) + "\n")
    for name in CONFIGS:
        tensors = result(name, out / "models")
        safetensors.torch.save_file(tensors, out / "results" / f"{name}.safetensors")
    files = sorted(p for p in out.rglob("*") if p.is_file())
    sums = [f"  {hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out)}" for p in files]
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("mergekit", "torch", "peft")
    )
    (out / "METADATA").write_text(
        'name: "mergekit golden files"\n'
        'description: "Tiny random models, configurations, and what mergekit merges them to."\n'
        "content: data only, made by the script; no code and no text of mergekit\n"
        f"versions: {versions}\n"
        "script: python tests/golden/make_mergekit.py\n"
        "licence: Apache-2.0 (as jlora; mergekit is LGPL-3.0, torch BSD-3-Clause, peft "
        "Apache-2.0)\n"
        "sha256:\n" + "\n".join(sums) + "\n"
    )


if __name__ == "__main__":
    main()
