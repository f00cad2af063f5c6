r"""Generators: an adapter from a condition, learned from adapters that were trained.

=========  =====================================================================================
c          condition, [E]: what describes a task
A_n, c_n   a bank of n trained adapters and their conditions, [n, E]
g_n        the task of each, [n]
=========  =====================================================================================

A system gives ``fit(key, conditions, groups, bank) -> state`` and ``generate(key, state, c) ->
adapter``. One condition gives one adapter; many conditions are a `jax.vmap`. Baselines that
interpolate are generators too, so that every generator is compared under one protocol.

Laws, each an error relative to the largest number of an array, 0 where it holds:

===========  ===============================================================================
same         one key gives one adapter, bit for bit, from state to state and call to call
batch        a vmap over conditions and keys is the loop over them
valid        sites, shapes and dtypes are those of an adapter of the bank, and all is finite
order        the order of the examples does not matter (systems that claim it)
refused      a condition that is not finite, or of another width, is an error that names it
conditioned  other conditions give other adapters
jit          jitted is eager
===========  ===============================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.contracts import tiny
from jlora.contracts.distance import gap, same_bits
from jlora.core.adapter import Adapter, stack
from jlora.core.method import Method
from jlora.system import System
from jlora.types import Dynamic, Tree

LAWS = ("same", "batch", "valid", "order", "refused", "conditioned", "jit")

State = Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator(System):
    """The record of a generator.

    Attributes:
      fit: (key, conditions [n, E], tasks [n], bank of n adapters) -> state.
      generate: (key, state, condition [E]) -> adapter.
      orderless: whether the order of the examples is claimed not to matter.
      width: E of the conditions that the laws give; a system whose conditions are statistics of
        activations needs that of its site.
      small: keyword arguments of `fit` with which the laws are measured in seconds; laws hold
        whatever the hyper-parameters.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/generator_test.py",)

    fit: Callable[..., State]
    generate: Callable[[PRNGKeyArray, State, Array], Adapter]
    orderless: bool = False
    width: int = 4
    small: Mapping[str, Dynamic] = dataclasses.field(default_factory=dict)


class World(NamedTuple):
    """What the laws are measured on: two adapters of each of four tasks, and new conditions."""

    bank: Adapter
    conditions: Float[Array, "8 E"]
    groups: Int[Array, "8"]
    queries: Float[Array, "3 E"]


def world(method: Method, seed: int = 0, width: int = 4) -> World:
    """Random tasks.

    Args:
      method: of all sites; what it freezes is shared by all adapters.
      seed: of the draws.
      width: E, of the conditions.

    Returns:
      The world.
    """
    rng, fresh = np.random.default_rng(seed), tiny.fresh(method, tiny.params(seed))
    bank = stack([tiny.moved(fresh, 20 + k) for k in range(8)])
    tasks, queries = (jnp.asarray(rng.normal(size=(n, width)), jnp.float32) for n in (4, 3))
    groups = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 2)
    return World(bank, tasks[groups], groups, queries)


def laws_of(record: Generator) -> tuple[str, ...]:
    """The laws that a system can be asked for.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "order" of systems that claim it alone.
    """
    return tuple(law for law in LAWS if law != "order" or record.orderless)


def error(law: str, record: Generator, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds, infinity where something is not finite.
    """
    worst = CHECKS[law](record, at)
    return worst if np.isfinite(worst) else float("inf")


def checked(condition: Float[Array, "E"], width: int) -> Float[Array, "E"]:
    """A condition that a generator can use.

    Args:
      condition: given to a generator; its values are checked outside of transformations only.
      width: E, of the conditions that it was fitted on.

    Returns:
      The condition, unchanged.

    Raises:
      ValueError: another shape, or a number that is not finite.
    """
    if condition.shape != (width,):
        raise ValueError(f"condition: got shape {condition.shape}, expected ({width},)")
    if not isinstance(condition, jax.core.Tracer) and not np.isfinite(condition).all():
        raise ValueError(f"condition: got {np.asarray(condition)}, expected finite numbers")
    return condition


def _key(k: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(3), k)


def _fitted(record: Generator, at: World) -> State:
    return record.fit(_key(0), at.conditions, at.groups, at.bank, **record.small)


def same(record: Generator, at: World) -> float:
    """0, or infinity where a second fit, or a second call, gives other bits.

    Args and Returns are those of `error`.
    """
    first, second = _fitted(record, at), _fitted(record, at)
    adapters = [record.generate(_key(1), s, at.queries[0]) for s in (first, first, second)]
    return 0.0 if all(same_bits(f, adapters[0]) for f in adapters) else float("inf")


def batch(record: Generator, at: World) -> float:
    """All conditions under one vmap.

    Args and Returns are those of `error`.
    """
    state, keys = _fitted(record, at), jnp.stack([_key(k) for k in range(len(at.queries))])
    many = jax.jit(jax.vmap(record.generate, (0, None, 0)))(keys, state, at.queries)
    each = [record.generate(k, state, c) for k, c in zip(keys, at.queries, strict=True)]
    return gap(many, jax.tree.map(lambda *t: jnp.stack(t), *each))


def valid(record: Generator, at: World) -> float:
    """0, or infinity where the adapter is none of the bank's kind.

    Args and Returns are those of `error`.
    """
    adapter, one = record.generate(_key(1), _fitted(record, at), at.queries[0]), at.bank[0]
    if jax.tree.structure(adapter) != jax.tree.structure(one):
        return float("inf")
    for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(one), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not np.isfinite(np.asarray(a)).all():
            return float("inf")
    return 0.0


def order(record: Generator, at: World) -> float:
    """Examples in reverse.

    Args and Returns are those of `error`.
    """
    turned = np.arange(len(at.groups))[::-1].copy()
    given = at.conditions[turned], at.groups[turned], at.bank[turned]
    state = record.fit(_key(0), *given, **record.small)
    adapters = (record.generate(_key(1), s, at.queries[0]) for s in (state, _fitted(record, at)))
    return gap(*adapters)


def refused(record: Generator, at: World) -> float:
    """0, or infinity where a bad condition gives an adapter.

    Args and Returns are those of `error`.
    """
    state, good = _fitted(record, at), at.queries[0]
    for bad in (good.at[1].set(jnp.nan), good.at[0].set(jnp.inf), good[:-1], at.queries):
        try:
            record.generate(_key(1), state, bad)
        except ValueError as problem:
            if "condition" in str(problem):
                continue
        return float("inf")
    return 0.0


def conditioned(record: Generator, at: World) -> float:
    """0, or infinity where two conditions that differ give one adapter.

    The conditions are those of two tasks of the bank.

    Args and Returns are those of `error`.
    """
    state = _fitted(record, at)
    adapters = [record.generate(_key(1), state, at.conditions[k]).trainable for k in (0, -1)]
    return 0.0 if gap(*adapters) > 1e-2 else float("inf")


def jit(record: Generator, at: World) -> float:
    """Jitted against eager.

    Args and Returns are those of `error`.
    """
    given = (_key(1), _fitted(record, at), at.queries[0])
    return gap(jax.jit(record.generate)(*given), record.generate(*given))


CHECKS: Mapping[str, Callable[[Generator, World], float]] = {
    "same": same,
    "batch": batch,
    "valid": valid,
    "order": order,
    "refused": refused,
    "conditioned": conditioned,
    "jit": jit,
}
