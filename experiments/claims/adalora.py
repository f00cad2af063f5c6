"""AdaLoRA: ranks that compete for a budget are better than as many ranks spread evenly."""

import functools

import jax.numpy as jnp

import jlora as jl
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.penalties import orthogonality
from jlora.schedules import adalora

DEPTH, FIRST, LAST, WEIGHT = 4, 6, 4, 0.1
SITES = DEPTH * len(lib.lib.SITES)
BUDGET = adalora.Budget(target=LAST * SITES, total=lib.lib.STEPS, warmup=10, final=20, interval=2)


def after(adapter, state, gradients, step, dense):
    """Scores, and ranks that are dropped."""
    del step, dense
    state, adapter = adalora.step(state, adapter, gradients, BUDGET)
    return adapter, state


def finish(adapter, state, step, key):
    """The ranks that are kept."""
    del step, key
    return adalora.mask(adapter, state.masks)


def penalty(adapter):
    """The paper's, at its weight for classification."""
    return WEIGHT * orthogonality(adapter)


PLAN = lib.on_attention(
    f"AdaLoRA, {FIRST} to {LAST} ranks per kernel",
    jl.AdaLoRA(rank=FIRST, alpha=float(FIRST)),
    start=adalora.start,
    after=after,
    finish=finish,
    penalty=penalty,
    layers=DEPTH,
)
EVEN = lib.on_attention(
    f"AdaLoRA's form of rank {LAST}, no allocation",
    jl.AdaLoRA(rank=LAST, alpha=float(LAST)),
    penalty=penalty,
    layers=DEPTH,
)


@functools.cache
def baseline():
    """LoRA at the rank that is left on average."""
    return lib.lora(LAST, layers=DEPTH)


def run(seed, workdir):
    """Test accuracy per task, one seed."""
    made = lib.trained(PLAN, seed, workdir)
    sides = [lib.judge(PLAN, made, "test", workdir)]
    sides.append(lib.judge(baseline(), lib.trained(baseline(), seed, workdir), "test", workdir))
    sides.append(lib.judge(PLAN, lib.lost(PLAN, seed, workdir), "test", workdir))
    more = {}
    for plan in (PLAN, EVEN, baseline()):
        more |= lib.about(plan, seed, workdir)
    for path, mask in made.state.masks.items():
        for layer, kept in enumerate(jnp.mean(jnp.sum(mask, axis=-1), axis=0)):
            more[f"ranks of {path.split('/')[-2]}, layer {layer}"] = float(kept)
    return Figures(
        lib.tasks(workdir).names, *(tuple(x.tolist()) for x in sides), more=more
    )  # fmt: skip


CLAIM = Claim(
    name="adalora",
    systems=("AdaLoRA allocation", "AdaLoRA"),
    statement=f"test accuracy at {LAST} ranks per kernel on average: AdaLoRA > LoRA of that rank",
    reference="Zhang 2023, 2303.10512: better than LoRA at equal budget",
    baseline=f"LoRA of rank {LAST} on all kernels",
    control="AdaLoRA on training labels in random order",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)
