"""IncreLoRA: ranks grown where they matter are better than even ones, and than those AdaLoRA keeps.

Few rows: 200 per task. The same mean rank for all, and the same number of steps.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import adalora as allocation
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.penalties import orthogonality
from jlora.schedules import increlora

DEPTH, MEAN, ROOM, ROWS, WEIGHT = allocation.DEPTH, 2, 8, 200, 0.1
SITES = DEPTH * len(lib.lib.SITES)
GROWTH = increlora.Growth(target=MEAN * SITES, top=2, warmup=5, interval=4, late=5)


def start(adapter):
    """The growth's state, and the optimizer's: its ranks count their own steps."""
    return increlora.start(adapter, GROWTH), increlora.late_adam(0.0, GROWTH).init(
        adapter.trainable
    )


def view(adapter, state, step, key):
    """Active ranks and the reserve."""
    del step, key
    return increlora.shown(adapter, state[0], GROWTH)


def after(adapter, state, gradients, step, dense, *, rate):
    """The update by Adam per rank, then growth by the score of the whole delta."""
    del step
    growth, moments = state
    rule = increlora.late_adam(rate, GROWTH)
    updates, moments = rule.update(gradients, moments, adapter.trainable, growth=growth)
    moved = adapter.replace(trainable=optax.apply_updates(adapter.trainable, updates))
    growth, moved = increlora.grow(growth, moved, gradients, GROWTH, dense)
    return moved, (growth, moments)


def finish(adapter, state, step, key):
    """The active ranks."""
    del step, key
    return increlora.mask(adapter, increlora.masks(state[0]), GROWTH)


def penalty(adapter):
    """The orthogonality of the paper, at its weight."""
    return WEIGHT * orthogonality(adapter)


@functools.cache
def plan(rate, dense=True, shuffled=False):
    """IncreLoRA at a rate; the loop's own optimizer does nothing."""

    def cosine(step):
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / lib.lib.STEPS))

    score = "" if dense else ", scores by rank"
    return lib.on_attention(
        f"IncreLoRA of mean rank {MEAN}{score}", jl.AdaLoRA(rank=ROOM, alpha=float(MEAN)),
        rate=rate, start=start, view=view, after=functools.partial(after, rate=cosine),
        finish=finish, solver=lambda schedule: optax.set_to_zero(), penalty=penalty, dense=dense,
        layers=DEPTH, rows=ROWS, shuffled=shuffled,
    )  # fmt: skip


@functools.cache
def best(dense, workdir):
    """The best of rates a factor of 3 apart, by validation accuracy."""
    rates = [8e-3 * lib.lib.FACTOR**k for k in (-1, 0, 1)]
    score = {}
    for rate in rates:
        made = lib.train(plan(rate, dense), rate, lib.lib.TUNING, workdir)
        score[rate] = float(lib.judge(plan(rate, dense), made, "validation", workdir).mean())
    return max(score, key=score.__getitem__)


@functools.cache
def adalora():
    """AdaLoRA that ends at the same budget, with the same rows."""
    budget = dataclasses.replace(allocation.BUDGET, target=MEAN * SITES)

    def step(adapter, state, gradients, step, dense):
        del step, dense
        state, adapter = allocation.adalora.step(state, adapter, gradients, budget)
        return adapter, state

    return dataclasses.replace(
        allocation.PLAN, name=f"AdaLoRA of mean rank {MEAN}", rows=ROWS, after=step,
        methods=dict.fromkeys(lib.lib.SITES, jl.AdaLoRA(rank=MEAN + 1, alpha=float(MEAN + 1))),
    )  # fmt: skip


def run(seed, workdir):
    """Test accuracy per task, one seed."""
    plain = lib.lora(MEAN, layers=DEPTH, rows=ROWS)
    rate, more = best(True, workdir), {}
    made = lib.train(plan(rate), rate, seed, workdir)
    lost = lib.train(plan(rate, shuffled=True), rate, seed, workdir)
    by_rank = best(False, workdir)
    other = lib.train(plan(by_rank, False), by_rank, seed, workdir)
    for one in (plain, adalora()):
        more |= lib.about(one, seed, workdir)
    sides = [lib.judge(plan(rate), made, "test", workdir),
             lib.judge(plain, lib.trained(plain, seed, workdir), "test", workdir),
             lib.judge(plan(rate), lost, "test", workdir)]  # fmt: skip
    own = lib.judge(plan(by_rank, False), other, "test", workdir)
    more |= {"IncreLoRA: rate": rate, "IncreLoRA, scores by rank: accuracy": float(own.mean())}
    for path, active in made.state[0].active.items():
        for layer, count in enumerate(np.asarray(active).mean(0)):
            more[f"ranks of {path.split('/')[-2]}, layer {layer}"] = float(count)
    return Figures(
        lib.tasks(workdir).names, *(tuple(x.tolist()) for x in sides), more=more
    )  # fmt: skip


CLAIM = Claim(
    name="increlora",
    systems=("IncreLoRA",),
    statement=f"test accuracy with {ROWS} training rows at mean rank {MEAN}: IncreLoRA > LoRA",
    reference="Zhang 2023, 2308.12043: better than LoRA and AdaLoRA, most with few parameters",
    baseline=f"LoRA of rank {MEAN} on all kernels (AdaLoRA at that budget is in the record)",
    control="IncreLoRA on training labels in random order",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)
