"""Settings of a fine-tuning run: one frozen dataclass, one absl flag per field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.config import check_fields, setting, wrong

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "lora_pro", "alt_lora", "riemannian", "lora_fa")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; `key` hashes them."""

    base: str = setting("base", "", "checkpoint directory of Hugging Face, or 'smollm2' (pinned)")
    base_name: str = setting(
        "base", "", "base_model_name_or_path of the result (default: the directory)"
    )
    dtype: str = setting("base", "float32", "of the frozen base and of activations", DTYPES)
    quantize: int = setting("base", 0, "bits of the frozen kernels: 8, 4, or 0 for dense")
    quantize_block: int = setting("base", 64, "numbers that share a scale", range=">= 2")
    data: str = setting("data", "", "training examples, jsonl: messages, or prompt and completion")
    eval_data: str = setting("data", "", "held-out examples of the same form; '': no evaluation")
    max_length: int = setting("data", 512, "tokens of a packed row", range=">= 2")
    long: str = setting(
        "data", "error", "what becomes of an example longer than a row", ("error", "drop")
    )
    pack: bool = setting("data", True, "several examples per row; false: one")
    method: str = setting(
        "adapter", "LoRA", "any class of jlora.methods; of a wrapper 'Decomposed(LoKr)'"
    )
    rank: int = setting("adapter", 8, "rank; 0: the method has none, or its default", range=">= 0")
    alpha: float = setting(
        "adapter", 16.0, "alpha; 0: the method has none, or its default", range=">= 0"
    )
    method_args: str = setting("adapter", "{}", "other hyper-parameters of the method, JSON")
    targets: str = setting(
        "adapter", r"layers/(attention|ffn)/.*kernel", "regex on the paths of adapted sites"
    )
    start: str = setting("adapter", "", "PEFT or Orbax directory of an adapter to continue from")
    steps: int = setting("train", 0, "optimizer steps; 0: as `epochs` says", range=">= 0")
    epochs: float = setting("train", 1.0, "passes over the examples", range="> 0")
    batch: int = setting("train", 8, "rows per step", range=">= 1")
    accumulate: int = setting("train", 1, "parts that a step's rows are computed in", range=">= 1")
    optimizer: str = setting("train", "adamw", "what turns gradients into steps", OPTIMIZERS)
    optimizer_args: str = setting("train", "{}", "its other hyper-parameters, JSON")
    lr: float = setting("train", 2e-4, "peak learning rate", range="> 0")
    schedule: str = setting(
        "train", "cosine", "after the warm-up", ("cosine", "linear", "constant")
    )
    warmup: float = setting("train", 0.03, "share of the steps", range="0 <= x <= 1")
    weight_decay: float = setting("train", 0.0, "decoupled from the gradient", range=">= 0")
    clip: float = setting("train", 1.0, "largest norm of a gradient; 0: any", range=">= 0")
    lora_plus: float = setting("train", 1.0, "LoRA+: B's rate over A's; 1: one rate", range="> 0")
    remat: str = setting(
        "train", "dots", "what is computed again: nothing, all but matmuls, everything",
        ("none", "dots", "all"),
    )  # fmt: skip
    fsdp: int = setting("train", 1, "devices over which weights and rows are split", range=">= 1")
    tensor: int = setting("train", 1, "devices over which each matmul is split", range=">= 1")
    save_every: int = setting("train", 50, "steps between checkpoints", range=">= 1")
    peft: bool = setting("result", True, "write a PEFT directory as well as Orbax")
    samples: int = setting("result", 3, "held-out prompts that are answered", range=">= 0")
    sample_tokens: int = setting("result", 48, "tokens of an answer at most", range=">= 1")
    seed: int = setting("train", 0, "of the adapter, the order and dropout", range="0 <= x < 2**31")

    def key(self, contents: Mapping[str, str]) -> str:
        """Ten hex digits over all settings but paths, and over what those paths hold.

        Args:
          contents: hash by name of each file that the run reads.
        """
        fields = dataclasses.asdict(self) | {"base": "", "data": "", "eval_data": "", "start": ""}
        blob = json.dumps([fields, dict(contents)], sort_keys=True).encode()
        return hashlib.sha256(blob).hexdigest()[:10]


def check(settings: Settings) -> None:
    """Raises ValueError "name: got X, expected Y" for the first setting that cannot work."""
    check_fields(settings)
    for name in ("base", "data"):
        if not getattr(settings, name):
            raise wrong(name, "", "a path")
    if settings.quantize not in (0, 4, 8):
        raise wrong("quantize", settings.quantize, "0, 4 or 8")
    if settings.batch % (parts := settings.accumulate * settings.fsdp):
        raise wrong("batch", settings.batch, f"a multiple of accumulate x fsdp = {parts}")
    try:
        re.compile(settings.targets)
    except re.error as error:
        raise wrong("targets", settings.targets, f"a regular expression ({error})") from error


def from_flags(values: flags.FlagValues) -> Settings:
    """The flags as checked `Settings`. Raises ValueError as `check`."""
    fields: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    check(settings)
    return settings
