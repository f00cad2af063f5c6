r"""What the claims of learned merges share: coefficients from a few rows, judged on test rows.

- `unlabelled`: coefficients of the eight adapters of `text_merges` from validation rows without
  labels, judged on all tasks; the control learns the coefficients of adapters in random
  directions.
- `few_shot`: for each task in turn the adapters of the *other* seven are composed by a few labelled
  rows of it, as for a task that is new; judged on its test rows. The baseline is the mean of the
  seven with the factor that does best on the same rows; the control learns from the same rows with
  their labels exchanged.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import text_merges
from experiments.claims.protocol import Figures
from experiments.merging import cells

Learner = Callable[
    [Callable, list[jl.Adapter], Any, jax.Array], jl.Adapter
]  # loss, ..., batch, key
PLAIN = text_merges.Side("task_arithmetic")


def unlabelled(method: str, seed: int, workdir: Path) -> Figures:
    """Accuracies of a learned merge of `cells`, one seed."""
    shared, plan = text_merges.bench(workdir), text_merges.PLAN
    tasks = shared.tasks
    setting = cells.Setting(str(len(tasks)), seed, tasks, (plan.ranks[0],) * len(tasks))
    lost = shared._replace(adapters=text_merges.random_directions(shared, seed))
    names, found = tuple(sorted(tasks)), []
    for bench in (shared, lost):
        made = cells.merged(bench, setting, method, plan)
        accuracy = text_merges.accuracies(workdir, made, 1.0, tasks, "test")
        found.append(tuple(accuracy[t] for t in names))
    base = text_merges.cell(PLAIN, "tasks", seed, workdir)
    more = {"factor baseline": base.factor}
    return Figures(names, found[0], tuple(base.accuracy[t] for t in names), found[1], more=more)


def few_shot(learner: Learner, seed: int, workdir: Path) -> Figures:
    """Accuracies of compositions for a new task, one seed.

    Args:
      learner: (loss of an adapter and a batch, adapters, batch, key) -> adapter.
      seed: of the adapters and the search.
      workdir: where the adapters are kept.
    """
    shared, rank = text_merges.bench(workdir), text_merges.PLAN.ranks[0]
    names, found = tuple(sorted(shared.tasks)), {"system": [], "baseline": [], "control": []}
    for task in names:
        others = [shared.adapters[t, seed, rank] for t in shared.tasks if t != task]
        rows = shared.validation[task]
        made = {}
        for side, label in (("system", rows.label), ("control", 1 - rows.label)):
            batch = (*rows.inputs, label)
            made[side] = _learn(learner, shared.apply, shared.base, others, batch, seed), 1.0
        mean = jl.merging.merge("task_arithmetic", others)
        grid = cells.factors(len(others), "task_arithmetic")
        few = [text_merges.accuracies(workdir, mean, c, (task,), "validation")[task] for c in grid]
        made["baseline"] = mean, grid[int(np.argmax(few))]
        for side, (adapter, factor) in made.items():
            hit = text_merges.accuracies(workdir, adapter, factor, (task,), "test")
            found[side].append(hit[task])
    system, base, control = (tuple(found[s]) for s in ("system", "baseline", "control"))
    return Figures(names, system, base, control)


def _learn(learner, apply, base, adapters, batch, seed) -> jl.Adapter:
    bank = jl.merging.gather(adapters)
    made = _learned(learner, apply, bank.sites, base, bank.bank, batch, jax.random.key(seed))
    return jl.merging.to_adapter(made, bank.sites)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _learned(learner, apply, sites, base, bank, batch, key):
    model = jl.lift(apply)
    size = next(iter(bank.values()))[0].shape[0]
    parts = [
        jl.merging.to_adapter({p: jl.algebra.LowRank(u[n], v[n]) for p, (u, v) in bank.items()},
                              sites)
        for n in range(size)
    ]  # fmt: skip

    def loss(adapter, batch):
        *inputs, label = batch
        logp = jax.nn.log_softmax(model(base, adapter, *inputs))
        return -jnp.take_along_axis(logp, label[:, None], axis=1).mean()

    return jl.algebra.deltas(learner(loss, parts, batch, key))
