"""LoRA vs full fine-tuning: at one training loss LoRA has intruder dimensions that it lacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import text_forgetting as lib
from experiments.claims.protocol import Claim, Figures
from jlora.analysis import intruders
from jlora.core.lift import flatten

RANK, OTHERS, TOP, EPSILONS = 8, (1, 64), 10, (0.3, 0.5, 0.7, 0.9)
SITES = lambda workdir: tuple(s for s, _ in lib.fresh(RANK, 0, workdir).sites)  # noqa: E731


@functools.partial(jax.jit, static_argnums=2)
def _survey(before, after, sites):
    return intruders.survey(before, after, sites, TOP)


def counted(params, workdir):
    """Mean number of intruders of a matrix per task, [T, thresholds]."""
    base, out = lib.lib.tasks(workdir).base, []
    for own in params:
        seen = _survey(base, own, SITES(workdir))
        every = [intruders.counts(x.cosine, EPSILONS).reshape(len(EPSILONS), -1)
                 for x in seen.values()]  # fmt: skip
        out.append(np.concatenate(every, axis=1).mean(1))
    return np.stack(out)


def spread(params, seed, workdir):
    """Every kernel with a normal change of the Frobenius norm of its own one (the control)."""
    base, out = lib.lib.tasks(workdir).base, []
    leaves, tree = flatten(base)
    for task, own in enumerate(params):
        new = dict(flatten(own)[0])
        for number, path in enumerate(lib.KERNELS):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), number)
            draw = jax.random.normal(key, leaves[path].shape, jnp.float32)
            size = jnp.linalg.norm((new[path] - leaves[path]).ravel())
            new[path] = leaves[path] + draw * (size / jnp.linalg.norm(draw.ravel()))
        out.append(jax.tree.unflatten(tree, list(new.values())))
    return tuple(out)


def run(seed, workdir):
    """Intruders per matrix and task, one seed."""
    base = lib.lib.tasks(workdir).base
    names = lib.lib.tasks(workdir).names
    at, more = EPSILONS.index(0.5), {}
    recipes = {r: lib.lora(r) for r in (RANK, *OTHERS)} | {0: lib.FULL}
    counts = {}
    for rank, recipe in recipes.items():
        made = lib.outcome(recipe, seed, workdir)
        counts[rank] = counted(made.params, workdir)
        more |= lib.about(recipe.name, made, workdir)
        for epsilon, value in zip(EPSILONS, counts[rank].mean(0), strict=True):
            more[f"{recipe.name}: intruders per matrix, threshold {epsilon:g}"] = float(value)
        more[f"{recipe.name}: rate"] = lib.rate(recipe, workdir)
    same = (base,) * len(names)
    more["base model: intruders per matrix"] = float(counted(same, workdir)[:, at].mean())
    more["base model: accuracy of probes of other corpora"] = float(lib.kept(same, workdir).mean())
    made = lib.outcome(recipes[RANK], seed, workdir)
    control = counted(spread(made.params, seed, workdir), workdir)
    sides = (x[:, at].tolist() for x in (counts[RANK], counts[0], control))
    return Figures(names, *(tuple(x) for x in sides), more=more)


CLAIM = Claim(
    name="intruders",
    systems=("LoRA vs Full Fine-tuning",),
    statement=f"intruders per matrix among the {TOP} leading directions, at a training loss of "
    f"{lib.LOSS:g}: LoRA of rank {RANK} > full fine-tuning of the same kernels",
    reference="Shuttleworth 2024, 2410.21228: full fine-tuning has none",
    baseline="full fine-tuning of the six kernels of the layer",
    control="a normal dense change of the Frobenius norm of LoRA's, per kernel",
    unit="intruders per matrix",
    assets=lib.lib.ASSETS,
    run=run,
)
