r"""O-LoRA: a new adapter per task, whose inputs are orthogonal to those of all before; they add up.

=========  ==================================================================
a_i, b_i   factors of task i, [d_in, r], [r, d_out]; frozen after the task
s_i        its scale
lambda     `strength` of the penalty
=========  ==================================================================

.. math:: \Delta_t = \sum_{i \le t} s_i \, a_i b_i, \qquad
          L_t = L_{task} + \lambda \sum_{i < t} \lVert a_i^T a_t \rVert_F^2

What task t writes is read from directions of the input that earlier tasks do not read, so that
their outputs change little. All tasks are served by one adapter, the sum of all, which needs to
know no task and can be merged.

Paper: Wang et al. 2023, arXiv:2310.14152.
Source: paper.
Deviates: the penalty is the sum of squares of the paper's equation (its code sums absolute values).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.contracts.stream import Stream, seen
from jlora.core.adapter import Adapter
from jlora.core.init import initialise
from jlora.core.site import widened
from jlora.methods.low_rank.lora import LoRA


class OLoRA(NamedTuple):
    """The state of the stream."""

    fresh: Adapter  # its sites and methods
    tasks: tuple[Adapter, ...]  # one per task so far, frozen


def init(fresh: Adapter) -> OLoRA:
    """The state before the first task.

    Args:
      fresh: an adapter of `jl.init`, of LoRA alone.

    Returns:
      The state without tasks.

    Raises:
      ValueError: a site of another method, or with a frozen `a`.
    """
    for site, method in fresh.sites:
        if type(method) is not LoRA or method.freeze_a:
            raise ValueError(f"{site.path}: got {method}, expected LoRA with a trained a")
    return OLoRA(fresh, ())


def start(key: PRNGKeyArray, state: OLoRA) -> Adapter:
    """A new adapter, which changes nothing yet.

    Args:
      key: of its `a`, another one per task.
      state: after the tasks so far.

    Returns:
      An adapter of the sites of `fresh`, with b zero.
    """
    leaves = {s.path: jax.ShapeDtypeStruct(s.shape, s.dtype) for s, _ in state.fresh.sites}
    return initialise(key, state.fresh.sites, leaves).replace(frozen=state.fresh.frozen)


def running(state: OLoRA, adapter: Adapter) -> Adapter:
    """The sum of all tasks so far and the one in training, as one LoRA adapter.

    Args:
      state: after the tasks so far.
      adapter: in training.

    Returns:
      A LoRA adapter whose rank is the sum of all ranks.
    """
    every, trainable, frozen, sites = (*state.tasks, adapter), {}, {}, []
    for site, method in adapter.sites:
        parts = [(x.trainable[site.path], x.frozen[site.path]["scale"]) for x in every]
        a = [p["a"] * scale[..., None, None].astype(p["a"].dtype) for p, scale in parts]
        b = [p["b"] for p, _ in parts]
        trainable[site.path] = {"a": jnp.concatenate(a, -1), "b": jnp.concatenate(b, -2)}
        frozen[site.path] = {"scale": jnp.ones_like(parts[0][1])}
        rank = trainable[site.path]["a"].shape[-1]
        sites.append((site, dataclasses.replace(method, rank=rank)))
    return Adapter(trainable, frozen, tuple(sites))


def penalty(state: OLoRA, adapter: Adapter, strength: float = 0.5) -> Float[Array, ""]:
    """How far the inputs of a new task are from orthogonal to those of all before.

    Args:
      state: after the tasks so far.
      adapter: in training.
      strength: lambda.

    Returns:
      A scalar, not negative; 0 in the first task.
    """
    total = jnp.zeros((), jnp.float32)
    for before in state.tasks:
        for site, _ in adapter.sites:
            a, new = (widened(x.trainable[site.path])["a"] for x in (before, adapter))
            total = total.astype(a.dtype) + jnp.sum((a.mT @ new) ** 2)
    return strength * total


def update(state: OLoRA, trained: Adapter) -> OLoRA:
    """The state after one more task.

    Args:
      state: before it.
      trained: its adapter.

    Returns:
      The state with one more task.
    """
    return state._replace(tasks=(*state.tasks, trained))


def adapter(state: OLoRA, task: int) -> Adapter:
    """The sum of all tasks so far, for every task.

    Args:
      state: after the tasks so far.
      task: one of them.

    Returns:
      One LoRA adapter, the same for all tasks.

    Raises:
      IndexError: the task has not come.
    """
    seen(task, len(state.tasks))
    return running(state._replace(tasks=state.tasks[:-1]), state.tasks[-1])


SYSTEM = Stream(
    name="O-LoRA",
    paper="Wang 2023, 2310.14152",
    symbol="OLoRA",
    evidence="sum and penalty by numpy; orthogonal inputs leave what earlier tasks read alone",
    missing="a stream of real tasks",
    examples=(LoRA(rank=2),),
    init=init,
    start=start,
    running=running,
    penalty=penalty,
    update=update,
    adapter=adapter,
)
