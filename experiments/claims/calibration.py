"""Calibration of fine-tuned encoders: LoRA is as calibrated as full fine-tuning."""

from pathlib import Path

import numpy as np

from experiments.claims import text_calibration as lib
from experiments.claims.protocol import Claim, Figures


def run(seed: int, workdir: Path) -> Figures:
    """Expected calibration error per task, one seed; what freezing A does is recorded too."""
    names = ("LoRA", "full fine-tuning", "LoRA, A frozen")
    lora, full, frozen = (lib.run(arm, seed, workdir) for arm in names)
    values = (lora.measures["ece"], full.measures["ece"], lora.sharpened)
    less = np.subtract(frozen.measures["ece"], lora.measures["ece"])
    worse = np.subtract(frozen.accuracy, lora.accuracy)
    more = lib.about(seed, workdir) | {
        "A frozen minus LoRA: ece": float(less.mean()),
        "A frozen minus LoRA: accuracy": float(worse.mean()),
    }
    return Figures(lib.tasks(workdir).names, *values, more=more)


CLAIM = Claim(
    name="calibration",
    systems=("Calibration measures",),
    statement=f"expected calibration error after {lib.STEPS} steps: LoRA of rank {lib.RANK} < full "
    "fine-tuning + 0.01",
    reference="HypeLoRA 2026, 2603.19278: LoRA is about as calibrated as full fine-tuning",
    baseline="full fine-tuning of the same layers",
    control="the same LoRA with its logits times 4",
    unit="expected calibration error",
    assets=lib.ASSETS,
    run=run,
    margin=-0.01,
    less_is_better=True,
)
