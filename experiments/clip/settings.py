"""Settings of base C: one frozen dataclass, one absl flag per field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from absl import flags

from experiments.clip.model import ClipConfig
from experiments.config import check_fields, setting, wrong
from experiments.pictures.sources import SIDE, STYLES
from jlora.models.vit import VitConfig

EMOJI = tuple(name for name in STYLES if name not in ("mnist", "fashion"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; `key` hashes those that a checkpoint depends on."""

    styles: str = setting(
        "data", "google,twitter,fluent,fluent_contrast", f"of {', '.join(EMOJI)}"
    )  # fmt: skip
    width: int = setting("model", 128, "of the tokens", range=">= 1")
    depth: int = setting("model", 4, "blocks", range=">= 1")
    heads: int = setting("model", 4, "of attention", range=">= 1")
    ffn: int = setting("model", 512, "inner width of the feed-forward block", range=">= 1")
    patch: int = setting("model", 8, "pixels of a patch, each way; it divides 32", range=">= 1")
    joint: int = setting("model", 128, "width of what pictures and texts share", range=">= 1")
    steps: int = setting("train", 2500, "optimizer steps; more continue a run", range=">= 1")
    batch: int = setting("train", 128, "pairs per step", range=">= 2")
    categories: float = setting(
        "train", 0.2, "share of pictures whose text is their category", range="0 <= x < 1"
    )
    optimizer: str = setting("train", "muon", "of the blocks' kernels", ("muon", "adamw"))
    lr: float = setting("train", 1e-3, "peak learning rate of AdamW", range="> 0")
    muon_lr: float = setting("train", 0.01, "peak learning rate of Muon", range="> 0")
    warmup: float = setting("train", 0.03, "share of the steps", range="0 <= x < 1")
    decay: float = setting(
        "train", 0.5, "share of the steps, the last ones, over which rates fall to zero",
        range="0 <= x < 1",
    )  # fmt: skip
    weight_decay: float = setting("train", 0.1, "of kernels", range=">= 0")
    clip: float = setting("train", 1.0, "largest norm of a gradient", range="> 0")
    ema: float = setting("train", 0.99, "of the averaged parameters", range="0 <= x < 1")
    save_every: int = setting("train", 200, "steps between checkpoints", range=">= 1")
    seed: int = setting("train", 0, "of weights, rows and texts", range="0 <= x < 2**31")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The styles by name."""
        return tuple(name.strip() for name in self.styles.split(","))

    def key(self) -> str:
        """Ten hex digits over all settings but how long it trains."""
        names = {"steps", "save_every"}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in names}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]

    def config(self, text: int) -> ClipConfig:
        """The architecture.

        Args:
          text: width of the text embeddings.
        """
        vit = VitConfig(
            side=SIDE, patch=self.patch, layers=self.depth, width=self.width, heads=self.heads,
            ffn=self.ffn,
        )  # fmt: skip
        return ClipConfig(vit, text, self.joint)


def check(settings: Settings) -> None:
    """Raises ValueError "name: got X, expected Y" for the first setting that cannot work."""
    check_fields(settings)
    if unknown := sorted(set(settings.chosen) - set(EMOJI)):
        raise wrong("styles", ",".join(unknown), f"some of {', '.join(EMOJI)}")
    if len(set(settings.chosen)) < len(settings.chosen):
        raise wrong("styles", settings.styles, "each at most once")
    if settings.warmup + settings.decay > 1:
        raise wrong("decay", settings.decay, f"at most 1 - warmup={settings.warmup}")
    settings.config(1)


def from_flags(values: flags.FlagValues) -> Settings:
    """The flags as checked `Settings`. Raises ValueError as `check`."""
    fields: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    check(settings)
    return settings
