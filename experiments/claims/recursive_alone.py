r"""Relaxed recursive layers against a model of as many parameters that is trained alone.

==========  ======================================================================================
t           held-out document, of `relaxed_recursive`
x_st        loss of base L as 2 loops of 3 layers with LoRA of rank r per depth, uptrained
y_st        loss of 3 layers that run once, with LoRA of rank 2 r: as many numbers but for the
            norms of 3 layers, the same steps
z_st        control: x with the factors of another depth
==========  ======================================================================================

.. math:: x_{st} < y_{st}

The three layers start as the first, the third and the last of base L, which is more than the paper
gives its small models; recorded too: the same size from random numbers. Rates are chosen per model
by the training loss.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import relaxed_recursive as base
from experiments.claims.protocol import Claim, Figures
from jlora.models import decoder
from jlora.models.decoder import DecoderConfig

KEPT = (0, 2, 5)  # layers of base L
ALONE, RANDOM = "three layers of the base", "three layers from random numbers"
MOVED = "factors of another depth"
RATES = {ALONE: base.RATES, RANDOM: (*base.RATES, 9e-3)}


def config() -> DecoderConfig:
    """The architecture of the model that is trained alone."""
    return dataclasses.replace(base.world().config, layers=base.BLOCKS)


def start_of(name: str) -> tuple[Any, jl.Adapter]:
    """Parameters and LoRA of twice the rank, which is as many factors as six layers have."""
    params, small = base.world().params, config()
    if name == RANDOM:
        params = decoder.init(jax.random.key(1), small)
    else:
        kept = jnp.asarray(KEPT, jnp.int32)
        params = {**params, "layers": jax.tree.map(lambda x: x[kept], params["layers"])}
    run = functools.partial(decoder.forward, config=small)
    rank = base.RANK * base.world().config.layers // small.layers
    methods = {base.KERNELS: jl.LoRA(rank, alpha=float(rank))}
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return params, jl.init(jax.random.key(0), run, params, ids, methods=methods)


@functools.cache
def _step(small: DecoderConfig):
    def step(params, adapter, state, ids, rate):
        def loss(values):
            whole = jl.merge(values[0], adapter.replace(trainable=values[1]))
            return base.nats(whole, ids, small).mean()

        values = params, adapter.trainable
        value, grads = jax.value_and_grad(loss)(values)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = optax.scale_by_adam().update(grads, state)
        params, trainable = jax.tree.map(lambda p, u: p - rate * u, values, updates)
        return params, adapter.replace(trainable=trainable), state, value

    return jax.jit(step)


@functools.cache
def trained(name: str, rate: float, seed: int) -> tuple[Any, float]:
    """Merged parameters after the steps of `relaxed_recursive`, and the loss of the last ones."""
    world, (params, adapter) = base.world(), start_of(name)
    state = optax.scale_by_adam().init((params, adapter.trainable))
    step, losses, size = _step(config()), [], world.rows.shape[1]
    for number in range(base.STEPS):
        draw = np.random.default_rng([seed, number])
        starts = draw.integers(0, len(world.train) - size + 1, base.BATCH)
        ids = world.train[starts[:, None] + np.arange(size)[None]]
        now = rate * (1 - number / base.STEPS)
        params, adapter, state, value = step(params, adapter, state, ids, now)
        losses.append(float(value))
    return jl.merge(params, adapter), float(np.mean(losses[-base.LAST :]))


@functools.cache
def best(name: str) -> float:
    """The rate of the lowest training loss."""
    score = {rate: trained(name, rate, base.TUNING)[1] for rate in RATES[name]}
    return min(score, key=lambda rate: float(np.nan_to_num(score[rate], nan=np.inf)))


@functools.cache
def _measure(small: DecoderConfig):
    return jax.jit(lambda params, ids: base.nats(params, ids, small).mean(-1))


def measured(params: Any) -> np.ndarray:
    """Loss of each held-out document with three layers, nats per token."""
    world, measure = base.world(), _measure(config())
    loss = np.concatenate([np.asarray(measure(params, row[None])) for row in world.rows])
    return np.asarray([loss[world.owner == n].mean() for n in range(len(world.units))])


def run(seed: int, workdir: Any) -> Figures:
    """Loss per held-out document, one seed."""
    rate = base.best("relaxed")
    loss = {name: base.measured(base.trained(name, rate, seed)[0]) for name in ("relaxed", MOVED)}
    loss |= {name: measured(trained(name, best(name), seed)[0]) for name in (ALONE, RANDOM)}
    more = {f"{name}: perplexity": float(np.exp(x.mean())) for name, x in loss.items()}
    more |= {f"{name}: rate": best(name) for name in (ALONE, RANDOM)} | {"relaxed: rate": rate}
    shared, adapter = base.start_of("relaxed")
    params, own = start_of(ALONE)
    more |= {"relaxed: numbers": float(base.size(shared) + base.size(adapter.trainable)),
             f"{ALONE}: numbers": float(base.size(params) + base.size(own.trainable))}  # fmt: skip
    sides = (tuple(loss[name].tolist()) for name in ("relaxed", ALONE, MOVED))
    return Figures(base.world().units, *sides, more=more)


CLAIM = Claim(
    name="recursive_alone",
    systems=("Relaxed Recursive Transformers",),
    statement=f"held-out loss of base L as 2 loops of {base.BLOCKS} layers with LoRA of rank "
    f"{base.RANK} per depth after {base.STEPS} steps < {base.BLOCKS} of its layers run once, with "
    "as many parameters, after as many steps",
    reference="Bae 2024, 2410.20672: better than a model of the recursive one's size",
    baseline=f"layers {KEPT} of base L, run once, with LoRA of rank {2 * base.RANK}",
    control="the factors of each layer are those of the next loop's layer of the same block",
    unit="loss",
    assets=("stdlib_texts",),
    run=run,
    less_is_better=True,
)
