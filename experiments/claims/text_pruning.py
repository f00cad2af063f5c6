r"""What the claims of pruning share: the upper layers of MiniLM lose half of their units.

==========  ==============================================================================
t           task, one of the four of `text_methods`; all train at once
u           units: 12 heads and 1536 feed-forward columns in each of `DEPTH` layers
m_t         masks of a task; with fixed masks the same for all
==========  ==============================================================================

A model is judged after it was sliced, as a smaller encoder with a smaller adapter merged.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jlora as jl
from experiments.claims import text_methods as lib
from experiments.claims import text_schedules
from experiments.merging import cells
from experiments.stages import world as world_lib
from jlora.pruning.linked_axes import Linked, linked
from jlora.types import Dynamic

DEPTH, HALF, RANK = 3, 0.5, 8
KERNELS = (*lib.SITES, "layers/ffn/up/kernel", "layers/ffn/down/kernel")


class Bench(NamedTuple):
    """The tasks, and the units of their base."""

    found: lib.Tasks  # with the full layers
    groups: tuple[Linked, ...]  # heads and columns
    small: Dynamic  # the classifier of the sliced layers
    scale: float  # of the classifier


@functools.cache
def bench(workdir: Path) -> Bench:
    """The tasks on the upper `DEPTH` layers."""
    found = text_schedules.tasks(workdir, DEPTH)
    config = dataclasses.replace(lib.CONFIG, layers=DEPTH)
    model = world_lib.build(config, workdir, None).model
    attention, ffn = "layers/attention", "layers/ffn"
    read = [f"{attention}/{n}/{k}" for n in ("query", "key", "value") for k in ("kernel", "bias")]
    heads = linked("heads", found.base, model.heads, read, [f"{attention}/out/kernel"])
    up = [f"{ffn}/up/kernel", f"{ffn}/up/bias"]
    columns = linked("columns", found.base, model.ffn, up, [f"{ffn}/down/kernel"])
    less = dataclasses.replace(
        model, heads=model.heads - int(HALF * model.heads), head_width=model.width // model.heads,
        ffn=model.ffn - int(HALF * model.ffn),
    )  # fmt: skip
    small = cells.text_classifier(less, config.head_scale)
    return Bench(found, (heads, columns), small, config.head_scale)


def fresh(found: lib.Tasks, seed: int) -> jl.Adapter:
    """LoRA of the six kernels before training, for full or sliced layers."""
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    methods = dict.fromkeys(KERNELS, jl.LoRA(rank=RANK, alpha=float(RANK)))
    return jl.init(jax.random.key(seed), found.apply, found.base, *example, methods=methods)


def accuracy(found: lib.Tasks, lanes: jl.Adapter, rows: str) -> np.ndarray:
    """Of every task with its own adapter, merged, [T]; rows "validation" or "test"."""
    at = np.arange(len(found.names))
    return lib.judge(found, lanes, getattr(found, rows), at).mean(1)
