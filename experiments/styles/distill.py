r"""Consistency distillation of base D's sampler into a LoRA, and pictures drawn in a few jumps.

The base with guidance is the teacher, the base with a LoRA the student, the student itself without
gradient the target (`jlora.generation.diffusion.consistency`). Style adapters of the same loop are
trained on the flow loss instead, and know nothing of the distillation:

.. math:: \theta' = \theta + \lambda_1 \tau_{\mathrm{style}} + \lambda_2 \tau

Rows, times, noise and guidance follow from seed and step alone.

Reference: Luo et al. 2023 (arXiv:2311.05556): every linear layer has a LoRA, guidance is fixed.
Deviates: 32 points of the solver, not 50: what a student knows of the data moves up by one point
    per step, and steps are few here, for which reason rates rise and fall, too. Modulations and
    embeddings have no LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.pictures.base_d import BaseD
from experiments.pictures.data import bytes_of
from experiments.pictures.sampling import AT_ONCE
from experiments.pictures.sources import SIDE
from experiments.pictures.train import bind
from experiments.stages.zoo_training import optimizer
from experiments.styles.zoo_training import fresh, velocity
from jlora.generation.diffusion import guidance, multistep
from jlora.generation.diffusion.consistency import Distillation, consistency_loss
from jlora.generation.diffusion.loss import Objective, diffusion_loss
from jlora.generation.diffusion.paths import rectified_flow
from jlora.models import dit

INNER = r"blocks/(attention|cross|ffn)/(query|key|value|out|up|down)/kernel"
SITES = rf"({INNER}|patch/kernel|time/(up|down)/kernel|last/out/kernel)"  # of the distillation
STYLE_SITES = r"blocks/(attention|ffn)/(query|key|value|out|up|down)/kernel"  # as the style zoo
PLAN = Distillation(rectified_flow(), "velocity", steps=32)


class Recipe(NamedTuple):
    """How an adapter is trained."""

    sites: str  # regex
    rank: int
    alpha: float
    steps: int
    batch: int  # pictures per step
    rate: float  # peak, of Adam
    guidance: float = 0.0  # of the teacher; 0: no teacher, the flow loss on the pictures


Rows = Callable[[int], tuple[np.ndarray, dit.Condition]]  # of a step: pictures in -1 .. 1


@functools.cache
def _step(config: dit.DiTConfig, recipe: Recipe) -> Any:
    tuned, rule = jl.lift(velocity(config)), optimizer(recipe.rate, recipe.steps)
    teacher = guidance.guided(bind(config))
    objective = Objective(rectified_flow(), "velocity", "logit_normal", drop=0.1)

    def loss(trainable: Any, params: Any, adapter: jl.Adapter, key: Any, x: Any, cond: Any) -> Any:
        def model(own: Any, z: Any, t: Any, one: Any, null: Any) -> Any:
            return tuned(params, adapter.replace(trainable=own), z, t, one, null), None

        if not recipe.guidance:
            return diffusion_loss(model, trainable, key, x, cond, objective)[0]
        return consistency_loss(
            guidance.plain(model), functools.partial(teacher, params), trainable, trainable, key,
            x, cond, PLAN, (recipe.guidance, recipe.guidance),
        )[0]  # fmt: skip

    def step(trainable: Any, state: Any, params: Any, adapter: jl.Adapter, key: Any, x: Any,
             cond: Any) -> Any:  # fmt: skip
        value, grads = jax.value_and_grad(loss)(trainable, params, adapter, key, x, cond)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = rule.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return jax.jit(step)


def train(base: BaseD, recipe: Recipe, rows: Rows, seed: int) -> tuple[jl.Adapter, np.ndarray]:
    """An adapter, and the loss of each step.

    Args:
      base: the model, frozen; the teacher where the recipe has one.
      recipe: of the adapter.
      rows: pictures and conditions of a step.
      seed: of A, times and noise.

    Raises:
      FloatingPointError: a loss that is not finite.
    """
    method = jl.LoRA(recipe.rank, recipe.alpha)
    adapter = fresh(base.config, base.names["longest_name"], recipe.sites, method, seed)
    trainable, step = adapter.trainable, _step(base.config, recipe)
    state, losses = optimizer(recipe.rate, recipe.steps).init(trainable), []
    for number in range(recipe.steps):
        key = jax.random.fold_in(jax.random.key(seed), number)
        trainable, state, value = step(
            trainable, state, base.params, adapter, key, *rows(number)
        )  # fmt: skip
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is not finite at step {number}")
    return adapter.replace(trainable=trainable), np.asarray(losses)


def turned(adapter: jl.Adapter, seed: int) -> jl.Adapter:
    """An adapter of the same size that points elsewhere: inputs and outputs of its sites permuted.

    The delta of each site keeps its singular values.

    Args:
      adapter: of LoRA.
      seed: of the permutations.
    """
    draw, permuted = np.random.default_rng(seed), {}
    for path, pair in adapter.trainable.items():
        a, b = pair["a"], pair["b"]
        rows, columns = draw.permutation(a.shape[-2]), draw.permutation(b.shape[-1])
        permuted[path] = {"a": a[..., rows, :], "b": b[..., columns]}
    return adapter.replace(trainable=permuted)


@functools.cache
def _sampler(config: dit.DiTConfig, steps: int) -> Any:
    shape = (SIDE, SIDE, config.channels)
    return multistep.build(guidance.plain(bind(config)), shape, PLAN, steps)


def sample(
    params: Any, config: dit.DiTConfig, styles: np.ndarray, words: np.ndarray, steps: int, seed: int
) -> np.ndarray:
    """Pictures of a distilled model, uint8 [n, 32, 32, 3].

    Args:
      params: of the base with the distilled adapter.
      config: its architecture.
      styles: int32 [n], 0 for none.
      words: int32 [n, k], 0 for padding.
      steps: evaluations per picture; guidance is in the adapter.
      seed: of the noise; picture i does not depend on how many are asked for.
    """
    run, count = _sampler(config, steps), len(styles)
    size, kept = min(AT_ONCE, count), []
    for start in range(0, count, size):
        # the last batch is a whole one: one shape is compiled
        rows = np.minimum(np.arange(start, start + size), count - 1)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
        condition = dit.Condition(jnp.asarray(styles[rows]), jnp.asarray(words[rows]))
        kept.append(np.asarray(run(params, keys, condition)))
    return bytes_of(np.concatenate(kept)[:count])
