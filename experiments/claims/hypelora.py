"""HypeLoRA: adapters that one small network writes for all layers, as accurate as LoRA's own."""

from pathlib import Path

from experiments.claims import text_calibration as lib
from experiments.claims.protocol import Claim, Figures


def run(seed: int, workdir: Path) -> Figures:
    """Test accuracy per task, one seed."""
    system, baseline = (lib.run(arm, seed, workdir) for arm in ("HypeLoRA", "LoRA"))
    control = lib.run("HypeLoRA", seed, workdir, shuffled=True)
    values = (system.accuracy, baseline.accuracy, control.accuracy)
    return Figures(lib.tasks(workdir).names, *values, more=lib.about(seed, workdir))


CLAIM = Claim(
    name="hypelora",
    systems=("HypeLoRA",),
    statement=f"test accuracy after {lib.STEPS} steps: HypeLoRA, A and B written by a network over "
    f"layer embeddings > LoRA of rank {lib.RANK} - 1 point",
    reference="HypeLoRA 2026, 2603.19278: writing both factors is about as good as training them",
    baseline=f"LoRA of rank {lib.RANK}",
    control="HypeLoRA on training labels in random order",
    unit="accuracy",
    assets=lib.ASSETS,
    run=run,
    margin=-0.01,
)
