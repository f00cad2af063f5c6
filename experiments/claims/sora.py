"""SoRA: of many ranks the few that its proximal step leaves are as good as LoRA of that rank."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_schedules as lib
from experiments.claims.protocol import Claim, Figures
from jlora.schedules import sora

RANK, STEPS, SHARE = 8, 120, 0.3
LAMBDAS = (0.5, 0.7, 1.0, 1.4, 2.0)  # threshold of a step over its learning rate
METHOD = jl.LoRA(rank=RANK, alpha=float(RANK))


def solver(schedule, weight):
    """Adam, then the threshold of the paper: the learning rate times lambda."""
    return optax.chain(optax.adam(schedule), sora.proximal(lambda n: weight * schedule(n)))


@functools.cache
def plan(weight):
    """SoRA of a lambda."""
    return lib.on_attention(
        f"SoRA of {RANK} ranks, lambda {weight:g}", METHOD, steps=STEPS,
        change=lambda adapter, seed: sora.gated(jax.random.key(seed + 1), adapter),
        solver=functools.partial(solver, weight=weight),
    )  # fmt: skip


def left(made):
    """Gates that are not zero, per task."""
    gates = [
        t[sora.GATE].reshape(t[sora.GATE].shape[0], -1) for t in made.adapter.trainable.values()
    ]
    return np.asarray(jnp.concatenate(gates, axis=1) != 0).sum(1)


@functools.cache
def chosen(workdir):
    """The smallest lambda that leaves the share of ranks, by a seed of its own."""
    for weight in LAMBDAS:
        one = plan(weight)
        made = lib.train(one, lib.tune(one, workdir).rate, lib.lib.TUNING, workdir)
        if left(made).mean() <= SHARE * RANK * len(lib.lib.SITES):
            break
    return one


def change_of_pruning(made, workdir):
    """The largest difference of logits that pruning makes, of the largest logit; first task."""
    found = lib.tasks(workdir)
    adapter = made.adapter.replace(trainable=jax.tree.map(lambda x: x[0], made.adapter.trainable))
    index = found.test[0][0, : lib.lib.ROWS]
    heads = jnp.broadcast_to(found.heads[0], (lib.lib.ROWS, *found.heads[0].shape))
    args = found.hidden[index], found.mask[index], heads
    run = lambda one: np.asarray(jl.lift(found.apply)(found.base, one, *args))  # noqa: E731
    whole, pruned = run(adapter), run(sora.fold(sora.prune(adapter)[0]))
    return float(np.abs(pruned - whole).max() / np.abs(whole).max())


def run(seed, workdir):
    """Test accuracy per task, one seed."""
    one = chosen(workdir)
    made = lib.trained(one, seed, workdir)
    count = left(made)
    plain = lib.lora(math.ceil(count.mean() / len(lib.lib.SITES)), STEPS)
    more = lib.about(one, seed, workdir) | lib.about(plain, seed, workdir)
    more |= lib.about(lib.lora(RANK, STEPS), seed, workdir)
    more |= {"share of ranks that are left": float(count.mean() / RANK / len(lib.lib.SITES)),
             "relative change of logits by pruning": change_of_pruning(made, workdir)}  # fmt: skip
    sides = (
        lib.judge(p, m, "test", workdir)
        for p, m in ((one, made), (plain, lib.trained(plain, seed, workdir)),
                     (one, lib.lost(one, seed, workdir)))
    )  # fmt: skip
    return Figures(lib.tasks(workdir).names, *(tuple(x.tolist()) for x in sides), more=more)


CLAIM = Claim(
    name="sora",
    systems=("SoRA",),
    statement="test accuracy: SoRA of 8 ranks, of which at most 30 % are left > LoRA of the rank "
    "that is left - 1 point",
    reference="Ding 2023, 2311.11696: fewer parameters than LoRA at no loss of quality",
    baseline="LoRA of the mean rank that is left, rounded up",
    control="SoRA on training labels in random order",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
    margin=-0.01,
)
