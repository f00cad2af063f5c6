"""What the tests of several stages share: the smallest world, and processes without torch."""

import os

import numpy as np
import pytest

from experiments.config import Config
from experiments.stages import codec, world, zoo_training
from jlora.generation.tokens import site_tokens

TINY = Config(
    base="tiny", tasks="toy", layers=1, max_length=8, train_texts=20, eval_rows=10, examples=2,
    zoo_steps=4, zoo_segment=4, zoo_batch=4, zoo_chunk=8, zoo_snapshots=2, references=2, latent=3,
)  # fmt: skip


@pytest.fixture(scope="session")
def quick(quick, tmp_path_factory):
    """That of all tests, without torch, which no experiment needs and TensorBoard's writer imports.

    Each process would import it: two seconds of a core.
    """
    path = tmp_path_factory.mktemp("no_torch")
    (path / "torch.py").write_text("raise ImportError('no torch for an experiment')\n")
    others = quick.get("PYTHONPATH", "")
    return quick | {"PYTHONPATH": os.pathsep.join([str(path), *filter(None, [others])])}


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A random two-layer encoder with the synthetic tasks; its config is `TINY`."""
    return world.build(TINY, tmp_path_factory.mktemp("world"), None)


@pytest.fixture(scope="session")
def tiny_encoded(tiny_world):
    """Three random adapters of each of the four seen tasks as tokens; no codec is fitted."""
    template = zoo_training.template(tiny_world, 0)
    spec = site_tokens.from_adapter(template)
    names, rng = tuple(tiny_world.names("seen")), np.random.default_rng(0)
    task = np.repeat(np.arange(len(names), dtype=np.int32), 3)
    centre = rng.normal(size=(len(names), spec.length, spec.dim))
    x = centre[task] + 0.3 * rng.normal(size=(len(task), spec.length, spec.dim))
    x = (0.05 * x * spec.mask).astype(np.float32)
    run = np.arange(len(task), dtype=np.int32)
    return codec.Encoded(spec, template, None, names, x, task, run, {}, {})


class Bar:
    """A progress bar that counts."""

    def __init__(self):
        self.count, self.points = 0, []

    def step(self, count, **shown):
        self.count += count

    def curve(self, step, values):
        self.points.append((step, dict(values)))


@pytest.fixture
def bar():
    return Bar()
