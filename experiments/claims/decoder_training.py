r"""What claims on base L share that train adapters: rows, steps of Adam, loss by kind of text.

==========  ==============================================================================
d           kind of text, one of the eight of `decoder_domains`
rows        of one kind, or of pieces of several kinds that follow each other
L_b         what a router adds to the loss for an even load, weight :math:`\lambda`
==========  ==============================================================================

.. math:: L = \mathrm{CE} + \lambda \cdot \text{mean over sites of } L_b

Learning rates decay linearly to zero. Balance states of routers advance after every step. The rate
of a method is the one with the lowest loss on validation rows, with a seed of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import decoder_domains as lib
from jlora.core.method import Method
from jlora.models.decoder import DecoderConfig
from jlora.routing.state import advance

BATCH, STEPS = 4, 60
TUNING = 10_000  # the seed that rates are chosen with


def rows(seed: int, number: int, kind: int | None = None) -> np.ndarray:
    """Training rows of a step, int32 [BATCH, length + 1].

    Args:
      seed: of the run.
      number: of the step.
      kind: of the text; None: every row has pieces of several kinds.
    """
    train, size = lib.world().train, lib.SEGMENT * lib.SEGMENTS + 1
    draw = np.random.default_rng([seed, 31, number])
    if kind is None:
        return lib.composed(list(train), BATCH, draw).ids
    begin = draw.integers(0, len(train[kind]) - size + 1, BATCH)
    return train[kind][begin[:, None] + np.arange(size)[None]]


@functools.cache
def _step(config: DecoderConfig, balance: float):
    model, rule = jl.lift(lib.run_of(config), aux=True), optax.scale_by_adam()

    def step(params, adapter, state, ids, rate):
        def loss(trainable):
            logits, aux = model(params, adapter.replace(trainable=trainable), ids[:, :-1])
            value = lib.nats(logits, ids).mean()
            parts = [jnp.mean(r["balance"]) for r in aux.values() if "balance" in r]
            more = balance * sum(parts) / len(parts) if balance and parts else 0.0
            return value + more, aux

        grads, aux = jax.grad(loss, has_aux=True)(adapter.trainable)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(grads, state)
        moved = jax.tree.map(lambda p, u: p - rate * u, adapter.trainable, updates)
        return advance(adapter, aux).replace(trainable=moved), state

    return jax.jit(step)


def train(
    adapter: jl.Adapter, rate: float, seed: int, kind: int | None = None, balance: float = 0.0
) -> jl.Adapter:
    """The adapter after `STEPS` steps on base L.

    Args:
      adapter: at its start, of any methods.
      rate: of the first step.
      seed: of the rows.
      kind: as of `rows`.
      balance: the weight of the routers' loss.
    """
    world = lib.world()
    state, step = optax.scale_by_adam().init(adapter.trainable), _step(world.config, balance)
    for number in range(STEPS):
        now = jnp.float32(rate * (1 - number / STEPS))
        adapter, state = step(world.params, adapter, state, rows(seed, number, kind), now)
    return adapter


@functools.cache
def _measure(config: DecoderConfig):
    model = jl.lift(lib.run_of(config))
    return jax.jit(lambda params, adapter, ids: lib.nats(model(params, adapter, ids[:, :-1]), ids))


def measured(adapter: jl.Adapter, at: lib.Rows) -> np.ndarray:
    """Loss of every token of rows, with an adapter that may have routers, [rows, length]."""
    world = lib.world()
    return np.asarray(_measure(world.config)(world.params, adapter, at.ids))


def by_kind(loss: np.ndarray, at: lib.Rows) -> np.ndarray:
    """Mean loss of the tokens of each kind of text, [D]."""
    return np.asarray([loss[at.kind[:, 1:] == d].mean() for d in range(len(lib.NAMES))])


def best(rates: Sequence[float], loss: Callable[[float], Any]) -> float:
    """The rate of the lowest loss; a loss that is not finite counts as the highest.

    Args:
      rates: to be tried.
      loss: rate -> validation loss.
    """
    score = {rate: float(np.nan_to_num(loss(rate), nan=np.inf)) for rate in rates}
    return min(score, key=score.__getitem__)


def fresh(method: Method, seed: int) -> jl.Adapter:
    """A method at its start on all kernels of base L."""
    world = lib.world()
    return lib.fresh(world.config, world.params, method, seed)
