"""Settings of a pretraining run: one frozen dataclass, one absl flag per field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from absl import flags

from experiments.config import check_fields, setting, wrong
from experiments.pretraining.texts import SOURCES
from jlora.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; `key` hashes those that a checkpoint depends on."""

    sources: str = setting("data", "moby_dick,sotu,grimm", f"of {', '.join(SOURCES)}")
    vocab: int = setting("data", 4096, "tokens of the byte-pair encoding", range=">= 2")
    layers: int = setting("model", 6, "depth", range=">= 1")
    width: int = setting("model", 192, "of the residual stream", range=">= 2")
    heads: int = setting("model", 6, "query heads", range=">= 1")
    kv_heads: int = setting("model", 2, "key and value heads", range=">= 1")
    ffn: int = setting("model", 448, "inner width of the gated feed-forward block", range=">= 1")
    context: int = setting("model", 256, "tokens of a training row", range=">= 2")
    steps: int = setting("train", 1000, "optimizer steps; more continue a run", range=">= 1")
    batch: int = setting("train", 8, "rows per step", range=">= 1")
    optimizer: str = setting("train", "muon", "of kernels; AdamW of the rest", ("muon", "adamw"))
    lr: float = setting("train", 3e-3, "peak learning rate of AdamW", range="> 0")
    muon_lr: float = setting("train", 0.02, "peak learning rate of Muon", range="> 0")
    warmup: float = setting(
        "train", 0.03, "share of the steps; cosine after it", range="0 <= x < 1"
    )
    weight_decay: float = setting("train", 0.1, "of kernels and the table", range=">= 0")
    clip: float = setting("train", 1.0, "largest norm of a gradient", range="> 0")
    save_every: int = setting("train", 50, "steps between checkpoints", range=">= 1")
    eval_rows: int = setting("card", 256, "held-out rows that the card measures", range=">= 1")
    seed: int = setting("train", 0, "of the weights and the rows", range="0 <= x < 2**31")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The sources by name."""
        return tuple(name.strip() for name in self.sources.split(","))

    def key(self) -> str:
        """Ten hex digits over all settings but how long it trains and what is measured after."""
        fields = dataclasses.asdict(self)
        for name in ("steps", "save_every", "eval_rows"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]

    def config(self) -> DecoderConfig:
        """The architecture: Llama's, with a tied head."""
        return DecoderConfig(
            "llama", self.vocab, self.layers, self.width, self.heads, self.kv_heads,
            self.width // self.heads, self.ffn, self.context, tied=True, norm_eps=1e-5,
        )  # fmt: skip


def check(settings: Settings) -> None:
    """Raises ValueError "name: got X, expected Y" for the first setting that cannot work."""
    check_fields(settings)
    if settings.width % settings.heads:
        raise wrong("width", settings.width, f"a multiple of heads={settings.heads}")
    if unknown := sorted(set(settings.chosen) - set(SOURCES)):
        raise wrong("sources", ",".join(unknown), f"some of {', '.join(SOURCES)}")
    if settings.vocab < 257:
        raise wrong("vocab", settings.vocab, "at least 257: 256 bytes and the end of a document")
    settings.config()


def from_flags(values: flags.FlagValues) -> Settings:
    """The flags as checked `Settings`. Raises ValueError as `check`."""
    fields: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    check(settings)
    return settings
