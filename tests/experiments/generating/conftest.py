"""A generator of the tiny base, for all tests of this folder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from experiments.config import Config
from experiments.generating import run
from experiments.stages import few_shot, zoo_training

CONFIG = Config(
    base="tiny", tasks="toy", layers=2, max_length=8, train_texts=20, eval_rows=10, examples=2,
    zoo_steps=4, zoo_batch=4, zoo_chunk=4, rank=2, alpha=2.0, canonical="none",
)  # fmt: skip


class Run(NamedTuple):
    """A finished run."""

    workdir: Path
    card: dict[str, Any]


def untrained(world, sets, factors, size, stops, bar):
    """LoRA on the examples as it starts: `rivals_test` trains it."""
    one = zoo_training.template(world, 0).trainable
    bank = jax.tree.map(lambda x: jax.numpy.stack([x] * len(sets)), one)
    bar.step(len(sets))
    return [bank] * stops


@pytest.fixture(scope="session")
def tiny_generator(tmp_path_factory):
    """What `run.run` writes and returns."""
    workdir = tmp_path_factory.mktemp("generator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_shot, "train", untrained)
        return Run(workdir, run.run(CONFIG, workdir))
