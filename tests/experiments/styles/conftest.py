"""The smallest run of the style experiment: a random base, drawn shapes, nine styles."""

import pytest

from experiments.pipeline import Context
from experiments.styles import pictures, zoo
from experiments.styles.settings import Settings

SMALL = Settings(
    base="tiny", preset="smoke", pictures=16, measured=2, rank=2, alpha=4.0, zoo_steps=6,
    zoo_batch=4, zoo_lr=1e-2, zoo_snapshots=2, zoo_chunk=5, zoo_segment=3, shots=4, draws=2,
    seen_measured=2, basis=6, components=4, flow_steps=4, width=8, depth=1,
    pdiff_ae_steps=3, pdiff_ae_width=2, pdiff_steps=3, pdiff_width=2, samples_each=2,
    few_steps="2,3", loss_pictures=2, loss_times=2,
    sampled=1, samples=2, sample_seeds=2, sample_steps=2,
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("styles")


@pytest.fixture(scope="session")
def context(folder):
    """Styles and zoo."""
    found = Context(SMALL, folder)
    for stage in (pictures.STAGE, zoo.STAGE):
        found = found.add(stage.name, stage.run(found))
    return found
