"""Settings of the style experiment: one frozen dataclass, one absl flag per field.

Every field names the earliest stage that reads it; a stage's key hashes the fields up to its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

from absl import flags

from experiments.config import check_fields, setting, wrong
from experiments.styles.catalogue import PRESETS

STAGES = ("data", "zoo", "generate", "evaluate", "sample", "report")
SHIPPED = "shipped"  # base D of the package
TINY = "tiny"  # a random base and drawn shapes, for tests
LAYOUT = 1  # of the stages' folders: raised when their files change


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings; `key(stage)` hashes what a stage depends on."""

    # data: base model, styles, pictures
    base: str = setting(
        "data", SHIPPED,
        "shipped; folder of a base D, as experiments.pretrain_pictures writes it; or tiny (random,"
        " for tests)",
    )  # fmt: skip
    preset: str = setting("data", "quick", "which styles", PRESETS)
    pictures: int = setting("data", 256, "training pictures per style", range=">= 2")
    measured: int = setting("data", 64, "held-out pictures per style", range=">= 2")
    token: str = setting(
        "data", "google", "style of the base by which pictures of every style are asked for"
    )
    # zoo
    sites: str = setting(
        "zoo", r"blocks/(attention|ffn)/(query|key|value|out|up|down)/kernel",
        "regex of adapted sites",
    )  # fmt: skip
    rank: int = setting("zoo", 4, "LoRA rank", range=">= 1")
    alpha: float = setting("zoo", 8.0, "LoRA alpha; scale = alpha / rank", range="> 0")
    zoo_seeds: int = setting("zoo", 1, "training runs per seen style", range=">= 1")
    zoo_steps: int = setting("zoo", 60, "optimizer steps per run", range=">= 1")
    zoo_batch: int = setting("zoo", 8, "pictures per step and run", range=">= 1")
    zoo_lr: float = setting("zoo", 3e-3, "peak learning rate (Adam, cosine decay)", range="> 0")
    zoo_snapshots: int = setting(
        "zoo", 2, "spaced snapshots kept of the last third of a run", range=">= 1"
    )
    zoo_chunk: int = setting("zoo", 4, "runs trained at once (vmapped)", range=">= 1")
    zoo_segment: int = setting("zoo", 20, "steps between checkpoints", range=">= 1")
    drop: float = setting("zoo", 0.1, "share of pictures without condition", range="0 <= x < 1")
    # generate
    seen_measured: int = setting(
        "generate", 8, "seen styles that are measured (held-out ones all are)", range=">= 1"
    )
    shots: int = setting("generate", 8, "pictures that a condition is made of", range=">= 1")
    draws: int = setting("generate", 4, "conditions per adapter that is learned from", range=">= 1")
    basis: int = setting("generate", 24, "rank of the common basis of all adapters", range=">= 1")
    components: int = setting("generate", 64, "latent numbers per token (flow)", range=">= 1")
    flow_steps: int = setting("generate", 600, "training steps of the flow", range=">= 1")
    width: int = setting("generate", 96, "of the flow's network", range=">= 1")
    depth: int = setting("generate", 3, "its blocks", range=">= 1")
    pdiff_ae_steps: int = setting(
        "generate", 300, "training steps of the paper's autoencoder", range=">= 1"
    )
    pdiff_ae_width: int = setting(
        "generate", 16, "inner decoder channels (the paper: 256)", range=">= 1"
    )
    pdiff_steps: int = setting("generate", 300, "training steps of the paper's DDPM", range=">= 1")
    pdiff_width: int = setting(
        "generate", 8, "first width of its U-Net (the paper: 64)", range=">= 1"
    )
    pdiff_levels: int = setting(
        "generate", 4, "blocks of its autoencoder, and widths of its U-Net", range=">= 2"
    )
    samples_each: int = setting("generate", 2, "generated adapters per style", range=">= 1")
    few_steps: str = setting(
        "generate", "10,20,40", "steps tried for LoRA trained on the condition's pictures"
    )
    # evaluate
    loss_pictures: int = setting(
        "evaluate", 16, "held-out pictures of a style's loss", range=">= 1"
    )
    loss_times: int = setting("evaluate", 4, "times per picture of a loss", range=">= 1")
    # sample
    sampled: int = setting("sample", 4, "styles per level that are sampled", range=">= 1")
    samples: int = setting("sample", 24, "pictures per style, method and seed", range=">= 2")
    sample_seeds: int = setting("sample", 3, "seeds of the samples' noise", range=">= 1")
    sample_steps: int = setting("sample", 12, "Euler steps of a sample", range=">= 1")
    guidance: float = setting("sample", 1.5, "scale of the condition; 1 is none", range=">= 0")
    seed: int = setting("data", 0, "of everything drawn", range="0 <= x < 2**31")

    @property
    def few(self) -> tuple[int, ...]:
        """The steps of `few_steps`, in order."""
        return tuple(sorted({int(part) for part in self.few_steps.split(",")}))

    def key(self, stage: str) -> str:
        """Ten hex digits over every field read up to a stage.

        Args:
          stage: one of STAGES.
        """
        upto = STAGES[: STAGES.index(stage) + 1]
        fields: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["stage"] in upto
        }
        blob = json.dumps(fields | {"layout": LAYOUT}, sort_keys=True).encode()
        return hashlib.sha256(blob).hexdigest()[:10]


def check(settings: Settings) -> None:
    """Raises ValueError "name: got X, expected Y" for the first setting that cannot work."""
    check_fields(settings)
    parts = [part.strip() for part in settings.few_steps.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise wrong("few_steps", settings.few_steps, "positive integers joined by commas")
    for name in ("shots", "zoo_batch"):
        if getattr(settings, name) > settings.pictures:
            raise wrong(name, getattr(settings, name), f"at most pictures={settings.pictures}")
    for name in ("loss_pictures", "samples"):
        if getattr(settings, name) > settings.measured:
            raise wrong(name, getattr(settings, name), f"at most measured={settings.measured}")
    if settings.width % 4:
        raise wrong("width", settings.width, "a multiple of 4")
    try:
        re.compile(settings.sites)
    except re.error as error:
        raise wrong("sites", settings.sites, f"a regular expression ({error})") from error


def from_flags(values: flags.FlagValues) -> Settings:
    """The flags as checked `Settings`. Raises ValueError as `check`."""
    fields: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    check(settings)
    return settings
