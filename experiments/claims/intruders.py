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
_basis = jax.jit(intruders.basis)
_against = jax.jit(intruders.against, static_argnums=2)


@functools.cache
def bases(workdir):
    """The singular vectors of the six kernels of the base."""
    leaves = flatten(lib.lib.tasks(workdir).base)[0]
    return {path: _basis(leaves[path]) for path in lib.KERNELS}


def counted(params, workdir):
    """Mean number of intruders of a matrix per task, [T, thresholds]."""
    out = []
    for own in params:
        leaves = flatten(own)[0]
        seen = [_against(b, leaves[path], TOP).cosine for path, b in bases(workdir).items()]
        out.append(np.asarray(intruders.counts(jnp.stack(seen), EPSILONS)).mean((1, 2)))
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
    more = {}
    recipes = {r: lib.lora(r) for r in (RANK, *OTHERS)} | {0: lib.FULL}
    counts = {}
    for rank, recipe in recipes.items():
        made = lib.outcome(recipe, seed, workdir)
        counts[rank] = counted(made.params, workdir)
        more |= lib.about(recipe.name, made, workdir)
        for epsilon, value in zip(EPSILONS, counts[rank].mean(0), strict=True):
            more[f"{recipe.name}: intruders per matrix, threshold {epsilon:g}"] = float(value)
        more[f"{recipe.name}: rate"] = lib.rate(recipe, workdir)
    more["base model: intruders per matrix"] = float(counted((base,), workdir).mean())
    same = lib.kept((base,) * len(names), workdir)
    more["base model: accuracy of probes of other corpora"] = float(same.mean())
    made = lib.outcome(recipes[RANK], seed, workdir)
    control = counted(spread(made.params, seed, workdir), workdir)
    sides = (x.mean(1).tolist() for x in (counts[RANK], counts[0], control))
    return Figures(names, *(tuple(x) for x in sides), more=more)


CLAIM = Claim(
    name="intruders",
    systems=("LoRA vs Full Fine-tuning",),
    statement=f"intruders per matrix among the {TOP} leading directions, mean over thresholds of "
    f"{EPSILONS[0]:g} to {EPSILONS[-1]:g}, at a training loss of {lib.LOSS:g}: LoRA of rank {RANK} "
    "> full fine-tuning of the same kernels",
    reference="Shuttleworth 2024, 2410.21228: full fine-tuning has none",
    baseline="full fine-tuning of the six kernels of the layer",
    control="a normal dense change of the Frobenius norm of LoRA's, per kernel",
    unit="intruders per matrix",
    assets=lib.lib.ASSETS,
    run=run,
)
