"""Settings of base D: one frozen dataclass, one absl flag per field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from absl import flags

from experiments.config import check_fields, setting, wrong
from experiments.pictures.sources import STYLES
from jlora.models.dit import DiTConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; `key` hashes those that a checkpoint depends on."""

    styles: str = setting("data", "google,twitter,mnist,fashion", f"of {', '.join(STYLES)}")
    width: int = setting("model", 160, "of the tokens", range=">= 1")
    depth: int = setting("model", 6, "blocks", range=">= 1")
    heads: int = setting("model", 5, "of attention", range=">= 1")
    ffn: int = setting("model", 480, "inner width of the feed-forward block", range=">= 1")
    patch: int = setting("model", 4, "pixels of a patch, each way; it divides 32", range=">= 1")
    rank: int = setting("model", 32, "of AdaLN-LoRA; 0: a matrix per block", range=">= 0")
    qk_norm: bool = setting("model", True, "normalise queries and keys")
    steps: int = setting("train", 6000, "optimizer steps; more continue a run", range=">= 1")
    batch: int = setting("train", 32, "pictures per step", range=">= 1")
    optimizer: str = setting("train", "muon", "of the blocks' kernels", ("muon", "adamw"))
    lr: float = setting("train", 1e-3, "peak learning rate of AdamW", range="> 0")
    muon_lr: float = setting("train", 0.01, "peak learning rate of Muon", range="> 0")
    warmup: float = setting("train", 0.03, "share of the steps", range="0 <= x < 1")
    decay: float = setting(
        "train", 0.3, "share of the steps, the last ones, over which rates fall to zero",
        range="0 <= x < 1",
    )  # fmt: skip
    weight_decay: float = setting("train", 0.01, "of kernels", range=">= 0")
    clip: float = setting("train", 1.0, "largest norm of a gradient", range="> 0")
    ema: float = setting("train", 0.999, "of the averaged parameters", range="0 <= x < 1")
    drop: float = setting("train", 0.1, "share of pictures without condition", range="0 <= x < 1")
    save_every: int = setting("train", 100, "steps between checkpoints", range=">= 1")
    classifier_steps: int = setting("card", 2000, "of the classifier's training", range=">= 1")
    samples: int = setting("card", 300, "pictures per set that the card measures", range=">= 1")
    guidance: float = setting("card", 2.0, "scale of the condition; 1 is none", range=">= 0")
    sample_steps: int = setting("card", 25, "Euler steps of a sample", range=">= 1")
    seed: int = setting("train", 0, "of weights, rows and noise", range="0 <= x < 2**31")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The styles by name."""
        return tuple(name.strip() for name in self.styles.split(","))

    def key(self) -> str:
        """Ten hex digits over all settings but how long it trains and what is measured after."""
        names = {"steps", "save_every", "classifier_steps", "samples", "guidance", "sample_steps"}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in names}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]

    def config(self, words: int) -> DiTConfig:
        """The architecture.

        Args:
          words: rows of the table of words.
        """
        return DiTConfig(
            len(self.chosen), words, self.patch, 3, self.width, self.depth, self.heads, self.ffn,
            self.rank, self.qk_norm,
        )  # fmt: skip


def check(settings: Settings) -> None:
    """Raises ValueError "name: got X, expected Y" for the first setting that cannot work."""
    check_fields(settings)
    if unknown := sorted(set(settings.chosen) - set(STYLES)):
        raise wrong("styles", ",".join(unknown), f"some of {', '.join(STYLES)}")
    if len(set(settings.chosen)) < len(settings.chosen):
        raise wrong("styles", settings.styles, "each at most once")
    if 32 % settings.patch:
        raise wrong("patch", settings.patch, "a divisor of 32")
    if settings.warmup + settings.decay > 1:
        raise wrong("decay", settings.decay, f"at most 1 - warmup={settings.warmup}")
    settings.config(2)


def from_flags(values: flags.FlagValues) -> Settings:
    """The flags as checked `Settings`. Raises ValueError as `check`."""
    fields: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    check(settings)
    return settings
