"""LoRA-Squeeze: trained at rank 32 and squeezed to 4, against LoRA trained at rank 4.

Four ways to an adapter of rank 4 in 60 steps: *direct*; *post*, squeezed after the last step (the
claim); *continued*, squeezed after step 45; *in-tuning*, rank 32, 24, 16, 8, 4 from step 15 to 45.
"""

import functools

import numpy as np
import optax

import jlora as jl
from experiments.claims import text_merges, text_training
from experiments.claims.protocol import Claim, Figures
from jlora.schedules.squeeze import anneal, project, squeeze

STEPS, HIGH, LOW = 60, 32, 4
FALL = ((15, 24), (25, 16), (35, 8), (45, 4))  # (step, rank) of in-tuning
SOLVER = optax.adam(text_training.RATE)


def trained(found, seed, rank, start=0, stop=STEPS, at=None):
    """(adapter, optimizer state) of LoRA from step `start` to `stop`; alpha is the rank."""
    if at is None:
        adapter = text_training.fresh(found, jl.LoRA(rank=rank, alpha=float(rank)), seed)
        at = adapter, SOLVER.init(adapter.trainable)
    adapter, state = at
    return text_training.fit(found, adapter, state, seed, solver=SOLVER, start=start, stop=stop)[:2]


def moved(made, adapter, state):
    """The squeezed adapter with the optimizer's moments moved along."""
    return made.adapter, project(state, made.maps, adapter.trainable)


def run(seed, workdir):
    """Test accuracies per task, one seed."""
    found = text_training.tasks(workdir)
    judge = functools.partial(text_training.accuracy, found)
    late = trained(found, seed, HIGH, stop=45)
    full, _ = trained(found, seed, HIGH, start=45, at=late)
    direct, _ = trained(found, seed, LOW)
    low = moved(squeeze(late[0], LOW), *late)
    continued, _ = trained(found, seed, LOW, start=45, at=low)
    at, before = None, 0
    for step, rank in FALL:
        at = trained(found, seed, HIGH, start=before, stop=step, at=at)
        at, before = moved(anneal(at[0], rank), *at), step
    tuned, _ = trained(found, seed, HIGH, start=before, at=at)
    lost = text_training.shuffled(found, seed)
    control, _ = trained(lost, seed, HIGH)
    more = {"rank 32": judge(full), "continued": judge(continued),
            "in-tuning": judge(squeeze(tuned, LOW).adapter)}  # fmt: skip
    return Figures(
        found.names,
        judge(squeeze(full, LOW).adapter),
        judge(direct),
        judge(squeeze(control, LOW).adapter),
        more={k: float(np.mean(v)) for k, v in more.items()},
    )


CLAIM = Claim(
    name="squeeze",
    systems=("LoRA-Squeeze",),
    statement="accuracy at rank 4: trained at rank 32 and squeezed > trained at rank 4",
    reference="Vulić 2026, 2602.10993: post-hoc compression is better than training at that rank",
    baseline="LoRA of rank 4 in as many steps",
    control="the same on training labels in random order",
    unit="accuracy",
    assets=text_merges.ASSETS,
    run=run,
)
