"""Schedules as variants: ranks that change while they are trained."""

import functools
import math

import jax
import optax

import jlora as jl
from experiments.variant_study.training import Schedule
from jlora.penalties import orthogonality
from jlora.schedules import adalora as allocation
from jlora.schedules import dylora as nested
from jlora.schedules import sora
from jlora.types import Dynamic, Tree

ORTHOGONAL = 0.1  # weight of AdaLoRA's penalty, the paper's for classification
LAMBDA = 0.7  # SoRA's threshold of a step over its learning rate


@functools.cache
def adalora(rank: int, steps: int, sites: int) -> Schedule:
    """Ranks that compete: from half as many again down to `rank` per matrix on average.

    Args:
      rank: that is left of each matrix.
      steps: of the run; a sixth of them before ranks fall, a third after.
      sites: matrices that compete.
    """
    budget = allocation.Budget(rank * sites, steps, warmup=steps // 6, final=steps // 3, interval=2)

    def after(adapter: jl.Adapter, state: Tree, gradients: Tree, step: Dynamic) -> Dynamic:
        del step  # the state counts
        state, adapter = allocation.step(state, adapter, gradients, budget)
        return adapter, state

    return Schedule(
        start=allocation.start,
        after=after,
        finish=lambda adapter, state: allocation.mask(adapter, state.masks),
        penalty=lambda adapter: ORTHOGONAL * orthogonality(adapter),
    )


@functools.cache
def dylora(rank: int, steps: int, sites: int) -> Schedule:
    """The first b ranks of every step, b uniform in 1 to `rank`; judged whole."""
    del steps, sites

    def view(adapter: jl.Adapter, state: Tree, step: Dynamic, key: Dynamic) -> jl.Adapter:
        del state, step
        return nested.truncate(adapter, nested.sample(key, 1, rank))

    return Schedule(view=view)


def matrices(adapter: jl.Adapter) -> int:
    """How many matrices are adapted, the layers of a stack one by one."""
    return sum(math.prod(site.stack) for site, _ in adapter.sites)


def gated(adapter: jl.Adapter, seed: int) -> jl.Adapter:
    """LoRA with a gate per rank, as SoRA starts."""
    return sora.gated(jax.random.key(seed + 1), adapter)


def proximal(rate: Dynamic) -> optax.GradientTransformation:
    """Adam, then the threshold of SoRA on the gates."""
    return optax.chain(optax.adam(rate), sora.proximal(lambda n: LAMBDA * rate(n)))
