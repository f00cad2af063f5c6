"""Intruder reduction: with its intruders at 0.7, LoRA forgets less of the other corpora.

The threshold is 0.9: after so few steps hardly a direction falls below 0.5, and reducing none says
nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import text_forgetting as lib
from experiments.claims.protocol import Claim, Figures
from jlora.analysis import intruder_reduction
from jlora.core.lift import flatten
from jlora.core.site import fold, unfold

RANK, TOP, EPSILON, FACTOR = 8, 10, 0.9, 0.7


@functools.partial(jax.jit, static_argnums=2)
def _reduced(base, adapter, factor):
    made = intruder_reduction.reduced(base, adapter, factor, TOP, EPSILON)
    return jl.merge(base, made.adapter), made.seen


@functools.partial(jax.jit, static_argnums=2)
def _others(params, seen, sites, key):
    """As many directions by chance, of those that are no intruders, at the factor."""
    leaves, tree = flatten(params)
    for number, site in enumerate(sites):
        x = seen[site.path]
        draw = jax.random.uniform(jax.random.fold_in(key, number), x.flags.shape)
        order = jnp.argsort(jnp.argsort(draw + x.flags.astype(draw.dtype)))
        flags = order < jnp.sum(x.flags, axis=-1, keepdims=True)
        w = fold(leaves[site.path], site.kinds)
        new = intruder_reduction.chosen(w, x, flags, FACTOR)
        leaves[site.path] = unfold(new, site.kinds, site.shape)
    return jax.tree.unflatten(tree, list(leaves.values()))


def shorter(base, own, like):
    """The whole change of every kernel, as long as that of other parameters."""

    def one(old, new, other):
        whole = jnp.linalg.norm((new - old).ravel())
        by = jnp.linalg.norm((other - old).ravel()) / jnp.where(whole > 0, whole, 1.0)
        return old + by * (new - old)

    return jax.tree.map(one, base, own, like)


def run(seed, workdir):
    """Accuracy of probes of the other corpora per task, one seed."""
    found = lib.lib.tasks(workdir)
    made = lib.outcome(lib.lora(RANK), seed, workdir)
    sites = tuple(s for s, _ in made.adapters[0].sites)
    weaker, seen = zip(*(_reduced(found.base, a, FACTOR) for a in made.adapters), strict=True)
    keys = jax.random.split(jax.random.key(seed), len(found.names))
    chance = tuple(_others(p, s, sites, k)
                   for p, s, k in zip(made.params, seen, keys, strict=True))  # fmt: skip
    short = tuple(shorter(found.base, p, w) for p, w in zip(made.params, weaker, strict=True))
    every = {"as trained": made.params, "reduced": weaker, "others by chance": chance,
             "the whole change as long as the reduced one": short}  # fmt: skip
    kept = {name: lib.kept(p, workdir) for name, p in every.items()}
    more = {f"{n}: accuracy": float(lib.accuracy(p, "test", workdir).mean())
            for n, p in every.items()}  # fmt: skip
    more |= {f"{n}: accuracy of probes of other corpora": float(k.mean()) for n, k in kept.items()}
    flags = [np.concatenate([np.asarray(x.flags).sum(-1).ravel() for x in s.values()]).mean()
             for s in seen]  # fmt: skip
    more["intruders per matrix"] = float(np.mean(flags))
    base = lib.kept((found.base,) * len(found.names), workdir)
    more["base model: accuracy of probes of other corpora"] = float(base.mean())
    sides = (kept[n] for n in ("reduced", "as trained", "others by chance"))
    return Figures(found.names, *(tuple(x.tolist()) for x in sides), more=more)


CLAIM = Claim(
    name="intruder_reduction",
    systems=("Intruder reduction",),
    statement=f"accuracy of probes of other corpora after LoRA of rank {RANK}: intruders "
    f"(threshold {EPSILON:g}) at {FACTOR:g} > as trained; the cost on the task's own test rows is "
    "recorded",
    reference="Shuttleworth 2024, 2410.21228: scaling intruders down lessens forgetting",
    baseline="the adapter as trained",
    control=f"as many leading directions by chance that are no intruders, at {FACTOR:g}",
    unit="accuracy",
    assets=lib.lib.ASSETS,
    run=run,
)
