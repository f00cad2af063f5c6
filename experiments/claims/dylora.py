"""DyLoRA: one training whose every truncation is better than LoRA cut to that rank."""

import numpy as np

import jlora as jl
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.schedules import dylora

RANK = 8


def view(adapter, state, step, key):
    """The first b ranks, b uniform."""
    del state, step
    return dylora.truncate(adapter, dylora.sample(key, 1, RANK))


def at(rank):
    """Judges the adapter at one rank."""
    return lambda adapter, state, step, key: dylora.truncate(adapter, rank)


METHOD = jl.LoRA(rank=RANK, alpha=float(RANK))
PLAN = lib.on_attention(f"DyLoRA of ranks 1 to {RANK}", METHOD, view=view)
WHOLE = lib.lora(RANK)


def over_ranks(plan, made, workdir):
    """Accuracies [rank, task] at every rank."""
    ranks = range(1, RANK + 1)
    return np.stack([lib.judge(plan, made, "test", workdir, at(r)) for r in ranks])


def run(seed, workdir):
    """Mean accuracy over ranks 1 to 8 of one training, per task."""
    found = over_ranks(PLAN, lib.trained(PLAN, seed, workdir), workdir)
    cut = over_ranks(WHOLE, lib.trained(WHOLE, seed, workdir), workdir)
    control = over_ranks(PLAN, lib.lost(PLAN, seed, workdir), workdir)
    more = lib.about(PLAN, seed, workdir) | lib.about(WHOLE, seed, workdir)
    for rank in (1, 2, 4, 8):
        alone = lib.lora(rank)
        own = lib.judge(alone, lib.trained(alone, seed, workdir), "test", workdir)
        more |= {f"rank {rank}: DyLoRA": float(found[rank - 1].mean()),
                 f"rank {rank}: LoRA of rank {RANK} cut to it": float(cut[rank - 1].mean()),
                 f"rank {rank}: LoRA trained at it": float(own.mean())}  # fmt: skip
    sides = (tuple(x.mean(0).tolist()) for x in (found, cut, control))
    return Figures(lib.tasks(workdir).names, *sides, more=more)


CLAIM = Claim(
    name="dylora",
    systems=("DyLoRA",),
    statement="mean test accuracy over ranks 1 to 8 of one training: DyLoRA > LoRA of rank 8 cut "
    "to each rank + 5 points",
    reference="Valipour 2023, 2210.07558: at low ranks far better than LoRA cut to them",
    baseline="LoRA of rank 8, cut to each rank",
    control="DyLoRA on training labels in random order",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
    margin=0.05,
)
