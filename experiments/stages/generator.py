r"""The generator: a DiT over site tokens that corrects a ridge prior, and its two training losses.

With the prior mean :math:`m(c)`, the zoo's latents z and the decoder D:

.. math::
    \mathcal{L}_1 = E\, \| f_\theta(y_t, t, c) - \mathrm{target}(y, \epsilon, t) \|^2,
    \quad y = (z - m(c)) / s

    \mathcal{L}_2 = E_{task, t}\; \mathrm{CE}\big( \mathrm{base} \oplus
    D(m(c) + s\, \hat y_\theta(\tilde y_t, t, c)),\ \text{training rows of the task} \big)
    + w \mathcal{L}_1

:math:`\tilde y_t` is the model's own estimate from pure noise (no gradient), noised again to a
random time: the task loss needs no trained adapter, so it covers every allowed pair of labels.
Held-out pairs, labels and corpora are in neither loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora as jl
from experiments.config import Config
from experiments.stages import codec, conditions
from experiments.stages.world import World, classifier
from jlora.generation.baselines import ridge
from jlora.generation.diffusion import dispersive, dit, ema, loss, paths, predict
from jlora.generation.generators import prior

PyTree = Any


class TrainState(NamedTuple):
    """Parameters and optimizer state (with the parameter average in it)."""

    params: PyTree
    solver: PyTree


class Fixed(NamedTuple):
    """What both losses read; arrays only, so that it is an argument of the jitted step."""

    residual: jax.Array  # [n, S, L] scaled latents of the zoo less the prior mean
    task: jax.Array  # [n] position of their seen task
    scale: jax.Array  # [S, 1] scale of the residual
    prior: prior.Prior  # mean that the DiT corrects
    stats: conditions.Scaling  # condition statistics
    fitted: codec.Fitted  # decoder and normaliser
    frozen: PyTree  # frozen leaves of the adapter
    table: conditions.Table  # seen tasks first, then the pool of the task loss
    embedding: jax.Array  # [N, E] base embeddings of all texts
    upper: PyTree  # parameters of the adapted layers
    hidden: jax.Array  # [N, t, d] states entering them
    mask: jax.Array  # [N, t]


def objective(config: Config) -> loss.Objective:
    """Path and prediction."""
    path = paths.rectified_flow() if config.objective == "flow" else paths.ddpm_linear()
    # x0 and not velocity on the flow: a fresh DiT then starts exactly at the prior mean.
    kind = {"flow": "x0", "v": "v", "eps": "eps"}[config.objective]
    return loss.Objective(path, kind, drop=config.cond_dropout)


def network(config: Config) -> dit.DiT:
    """The denoiser."""
    return dit.DiT(width=config.width, depth=config.depth, heads=config.heads)


def solver(rate: float, steps: int, decay: float) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, clipped, with a running average of the parameters."""
    warm = max(1, min(100, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, steps, rate / 50)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=1e-4),
        ema.average(decay),
    )


def step_of(value: Callable, opt: optax.GradientTransformation) -> Callable:
    """`step(state, data, key) -> (state, metrics)` of `value(params, data, key) -> (loss, {})`."""

    def step(state: TrainState, data: Any, key: jax.Array) -> tuple[TrainState, dict]:
        (total, parts), grads = jax.value_and_grad(value, has_aux=True)(state.params, data, key)
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            moved, inner = opt.update(grads, state.solver, state.params)
        return TrainState(optax.apply_updates(state.params, moved), inner), {"loss": total, **parts}

    return step


def diffusion_value(config: Config) -> Callable:
    """Loss 1 as `value(params, data, key)`, plus the Dispersive Loss of `--dispersive`."""
    goal, model = objective(config), dit.bind(network(config))

    def value(params: PyTree, data: Fixed, key: jax.Array) -> tuple[jax.Array, dict]:
        k_row, k_cond, k_loss, k_noise = jax.random.split(key, 4)
        rows = jax.random.randint(k_row, (config.batch,), 0, data.residual.shape[0])
        task = data.task[rows]

        def draw(key, task):
            raw = conditions.random(data.table, data.embedding, key, task, config.examples)
            return conditions.scaled(data.stats, raw)

        cond = jax.vmap(draw)(jax.random.split(k_cond, config.batch), task)
        cond = cond + config.cond_noise * jax.random.normal(k_noise, cond.shape)
        total, out = loss.diffusion_loss(model, params, k_loss, data.residual[rows], cond, goal)
        spread = jnp.float32(0)
        if config.dispersive != "none":
            spread = dispersive.dispersive_loss(config.dispersive, out.hidden, task)
        parts = {"diffusion": total, "dispersive": spread}
        return total + config.dispersive_weight * spread, parts

    return value


def task_value(
    config: Config,
    world: World,
    template: jl.Adapter,
    encoded: codec.Encoded,
    kernel: ridge.Kernel,
    pool: int,
) -> Callable:
    """Loss 2 as `value(params, data, key)`; the first `pool` tasks of the table may be drawn."""
    goal, model = objective(config), dit.bind(network(config))
    tuned = jl.lift(classifier(world.model, config.head_scale))
    diffusion = diffusion_value(config)
    last = jnp.float32(1.0 if config.objective == "flow" else 0.98)

    def estimate(params, z, t, cond):
        out, _ = model(params, z, t, cond, jnp.asarray(False))
        return predict.estimates(goal.path, goal.kind, out, z, t)[0]

    def one(params: PyTree, data: Fixed, key: jax.Array, task: jax.Array):
        k_cond, k_first, k_second, k_time, k_rows = jax.random.split(key, 5)
        raw = conditions.random(data.table, data.embedding, k_cond, task, config.examples)
        cond = conditions.scaled(data.stats, raw)
        shape = data.residual.shape[1:]
        guess = estimate(params, jax.random.normal(k_first, shape), last, cond)
        t = last * jax.random.uniform(k_time, (), minval=0.05, maxval=1.0)
        noisy = goal.path.mix(jax.lax.stop_gradient(guess), jax.random.normal(k_second, shape), t)
        added = estimate(params, noisy, t, cond)
        x = tokens(data, encoded.kinds["generator"], kernel, cond, False, added)
        adapter = template.replace(trainable=codec.to_trainable(encoded, x), frozen=data.frozen)
        rows, label = conditions.random_rows(data.table, k_rows, task, config.task_rows)
        heads = data.table.heads[task]
        heads = jnp.broadcast_to(heads, (config.task_rows, *heads.shape))
        logits = tuned(data.upper, adapter, data.hidden[rows], data.mask[rows], heads)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return nll, (logits.argmax(-1) == label).astype(jnp.float32).mean()

    def value(params: PyTree, data: Fixed, key: jax.Array) -> tuple[jax.Array, dict]:
        k_task, k_runs, k_flow = jax.random.split(key, 3)
        task = jax.random.randint(k_task, (config.task_batch,), 0, pool)
        keys = jax.random.split(k_runs, config.task_batch)
        nll, right = jax.vmap(lambda k, i: one(params, data, k, i))(keys, task)
        flow, _ = diffusion(params, data, k_flow)
        parts = {"task": nll.mean(), "accuracy": right.mean(), "diffusion": flow}
        return nll.mean() + config.task_flow_weight * flow, parts

    return value


def tokens(
    data: Any,
    kind: str,
    kernel: ridge.Kernel,
    cond: jax.Array,
    null: jax.Array | bool,
    added: jax.Array,
) -> jax.Array:
    """Canonical tokens [T, D] of prior mean + scaled addition [S, L]; `data` has the arrays."""
    z = prior.mean(data.prior, kernel, cond, null) + data.scale * added
    return codec.decode(kind, data.fitted, z)
