r"""What the claims of adaptation methods share: one adapter per task on MiniLM's last layer.

=========  ===================================================================================
T          tasks, 8 of the merging claims; a leading axis of the trained arrays
W          the kernels of the last layer, frozen; the states that enter it are cached
=========  ===================================================================================

All tasks are trained at once, each on its own rows: one optimizer step moves every task's adapter
by the gradient of its own mean loss over a batch. Test accuracy is that of the lifted model on 64
rows of each task. With shuffled labels (the control) nothing can be learned that test rows reward.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import federated_rounds, federated_text, text_merges
from experiments.merging import cells

SITES = federated_rounds.SITES
BATCH, RATE, TEST_ROWS = 8, 5e-3, 64


class Tasks(NamedTuple):
    """Rows of all tasks, and the model."""

    apply: Callable[..., jax.Array]  # (params, hidden, mask, head) -> logits; hashable
    base: Any  # parameters of the last layer
    names: tuple[str, ...]
    index: jax.Array  # [T, n] int32, training rows of a task, repeated to one number
    label: jax.Array  # [T, n] int32
    heads: jax.Array  # [T, 2, d]
    hidden: jax.Array  # [N, t, d], states of all texts
    mask: jax.Array  # [N, t] bool
    test: tuple[Any, jax.Array, tuple[int, ...]]  # inputs [T, n, ...], label [T, n], real rows


@functools.cache
def tasks(workdir: Path) -> Tasks:
    """The eight tasks; the states are computed once per process."""
    world, base, hidden = federated_text.world(workdir)
    names = tuple(world.names("seen")[: text_merges.SIZE])
    rows = [world.rows[n, "train"] for n in names]
    most = max(len(r.index) for r in rows)
    test = [cells.rows(world._replace(hidden=hidden), n, "test", TEST_ROWS) for n in names]
    stack = lambda xs: jnp.asarray(np.stack(xs))  # noqa: E731
    return Tasks(
        cells.text_classifier(world.model, world.config.head_scale),
        base,
        names,
        stack([np.resize(r.index, most) for r in rows]),
        stack([np.resize(r.label, most) for r in rows]),
        stack([world.head_of(n) for n in names]),
        hidden,
        world.mask,
        (
            tuple(jnp.stack(xs) for xs in zip(*(r.inputs for r in test), strict=True)),
            jnp.stack([r.label for r in test]),
            tuple(r.real for r in test),
        ),
    )


def shuffled(found: Tasks, seed: int) -> Tasks:
    """The same training rows with the labels of each task in random order (the control)."""
    draw = np.random.default_rng([seed, 5])
    return found._replace(label=jnp.asarray(draw.permuted(np.asarray(found.label), axis=1)))


def fresh(found: Tasks, method: Any, seed: int) -> jl.Adapter:
    """A method at its start on the attention kernels, one copy per task: trained arrays [T, ...].

    Args:
      found: the tasks.
      method: of the four attention kernels.
      seed: of the start, which all tasks share.
    """
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    methods = dict.fromkeys(SITES, method)
    one = jl.init(jax.random.key(seed), found.apply, found.base, *example, methods=methods)
    size = len(found.names)
    return one.replace(
        trainable=jax.tree.map(lambda x: jnp.repeat(x[None], size, axis=0), one.trainable)
    )


def fit(
    found: Tasks, adapter: jl.Adapter, state: Any, seed: int, *, solver: Any, start: int, stop: int
) -> tuple[jl.Adapter, Any, float]:
    """Training steps `start` to `stop`; the adapter, the optimizer's state and the mean loss.

    Args:
      found: the tasks.
      adapter: as `fresh` makes it, or trained before.
      state: the optimizer's, of the trained arrays.
      seed: of the batches; step n draws the same rows whatever was trained before.
      solver: an optax transformation.
      start: first step.
      stop: the step after the last one.
    """
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(jnp.arange(start, stop))
    trainable, state, loss = _fit(
        found.apply, adapter.sites, solver, found._replace(apply=None, names=(), test=None),
        adapter.trainable, adapter.frozen, state, keys,
    )  # fmt: skip
    return adapter.replace(trainable=trainable), state, float(loss)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(apply, sites, solver, found, trainable, frozen, state, keys):
    model = jl.lift(apply)

    def loss(one, index, label, head):
        adapter = jl.Adapter(one, frozen, sites)
        heads = jnp.broadcast_to(head, (BATCH, *head.shape))
        logits = model(found.base, adapter, found.hidden[index], found.mask[index], heads)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def total(every, pick):
        index = jnp.take_along_axis(found.index, pick, axis=1)
        label = jnp.take_along_axis(found.label, pick, axis=1)
        return jax.vmap(loss)(every, index, label, found.heads).sum()

    def step(carry, key):
        every, state = carry
        pick = jax.random.randint(key, (found.index.shape[0], BATCH), 0, found.index.shape[1])
        value, grads = jax.value_and_grad(total)(every, pick)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = solver.update(grads, state, every)
        return (optax.apply_updates(every, updates), state), value

    (trainable, state), values = jax.lax.scan(step, (trainable, state), keys)
    return trainable, state, values.mean() / found.index.shape[0]


def accuracy(found: Tasks, adapter: jl.Adapter) -> tuple[float, ...]:
    """Test accuracy of every task with its own adapter."""
    inputs, label, real = found.test
    hit = _hits(found.apply, adapter.sites, found.base, adapter.trainable, adapter.frozen,
                inputs, label)  # fmt: skip
    return tuple(float(h[:n].mean()) for h, n in zip(np.asarray(hit), real, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hits(apply, sites, base, trainable, frozen, inputs, label):
    model = jl.lift(apply)

    def one(one, inputs, label):
        logits = model(base, jl.Adapter(one, frozen, sites), *inputs)
        return logits.argmax(-1).astype(jnp.int32) == label

    return jax.vmap(one)(trainable, inputs, label)
