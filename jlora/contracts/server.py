r"""Servers: many adapters over one base, that come and go while batches run.

A system gives four functions of a state of its own:

- ``start(model, params, empty, capacity) -> state``, with ``model(params, x)`` of one row and an
  adapter that changes nothing, of the largest rank to be served;
- ``load(state, name, adapter) -> state`` and ``unload(state, name) -> state``;
- ``run(state, names, xs) -> Answers``, a name or None (the base) per row.

A row answers as if its adapter were merged into the base,

.. math:: y_{row} = f(\mathrm{merge}(W, p_{n(row)}), x_{row})

Laws, each an error relative to the largest answer, 0 where it holds:

===========  ===============================================================================
rows         every row of a mixed batch is that of its own merged weights
base         a row without an adapter is the base
unknown      a name that is not loaded is an error of its own rows, and of no other row
unload       an adapter that is unloaded is unknown, and its place is free, with no trace of it
isolated     what others load and unload changes no bit of a row, nor of an earlier state
swap         loading, unloading and other mixes of rows compile nothing
order        the order of loading does not matter
full         one more adapter than fits is refused by name, and so is a name that is taken
===========  ===============================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.contracts import tiny
from jlora.contracts.distance import gap, same_bits
from jlora.core.adapter import Adapter
from jlora.core.merge import merge
from jlora.core.method import Method
from jlora.system import System
from jlora.types import Tree

LAWS = ("rows", "base", "unknown", "unload", "isolated", "swap", "order", "full")
CAPACITY = 3

Model = Callable[[Tree, Tree], Tree]  # (params, x of one row) -> output
State = Tree


class Answers(NamedTuple):
    """What a server says to a batch."""

    outputs: Tree  # leading axis of rows
    errors: Mapping[int, Exception]  # row -> why it has no answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server(System):
    """The record of a server.

    Attributes:
      start: (model, params, adapter that changes nothing, capacity) -> state.
      load: (state, name, adapter) -> state.
      unload: (state, name) -> state.
      run: (state, names, xs) -> `Answers`.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/server_test.py",)

    start: Callable[[Model, Tree, Adapter, int], State]
    load: Callable[[State, str, Adapter], State]
    unload: Callable[[State, str], State]
    run: Callable[[State, Sequence[str | None], Tree], Answers]


class World(NamedTuple):
    """What the laws are measured on: the tiny model, four adapters, four rows."""

    params: tiny.Params
    empty: Adapter  # of the largest rank
    adapters: Mapping[str, Adapter]  # the first has the largest rank
    xs: Float[Array, "4 3 5"]


def world(methods: Sequence[Method], seed: int = 0) -> World:
    """Random adapters and rows.

    Args:
      methods: of the adapters called a, b, c, d; the first has the largest rank.
      seed: of the draws.

    Returns:
      The world.
    """
    p = tiny.params(seed)
    adapters = dict(zip("abcd", tiny.trained(methods, p), strict=True))
    return World(p, tiny.fresh(methods[0], p), adapters, tiny.inputs(4, seed))


def error(law: str, record: Server, at: World) -> float:
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


def model(params: tiny.Params, x: Float[Array, "3 5"]) -> Float[Array, "3 5"]:
    """The tiny model, at time 0.

    Args:
      params: its weights.
      x: one row.

    Returns:
      Its output.
    """
    return tiny.model(params, x, jnp.zeros(()))


_merged = jax.jit(lambda params, adapter, x: model(merge(params, adapter), x))


def _want(at: World, names: Sequence[str | None]) -> list[Array]:
    return [
        model(at.params, x) if name is None else _merged(at.params, at.adapters[name], x)
        for name, x in zip(names, at.xs, strict=True)
    ]


def _started(record: Server, at: World, names: Sequence[str]) -> State:
    state = record.start(model, at.params, at.empty, CAPACITY)
    for name in names:
        state = record.load(state, name, at.adapters[name])
    return state


def _answer(record: Server, at: World, state: State, names: Sequence[str | None]) -> list[Array]:
    """Answers of all rows.

    Raises:
      The error of a row, where it has one.
    """
    answer = record.run(state, names, at.xs)
    for problem in answer.errors.values():
        raise problem
    return list(answer.outputs)


def _refused(action: Callable[[], Tree], *named: str) -> bool:
    """Whether an action is an error that names these."""
    try:
        action()
    except (ValueError, KeyError) as problem:
        return all(name in str(problem) for name in named)
    return False


def rows(record: Server, at: World) -> float:
    """Four rows of three adapters.

    Args and Returns are those of `error`.
    """
    names = ["b", "a", "c", "b"]
    return gap(_answer(record, at, _started(record, at, "abc"), names), _want(at, names))


def base(record: Server, at: World) -> float:
    """Rows with no adapter, among others and alone.

    Args and Returns are those of `error`.
    """
    state = _started(record, at, "ab")
    answers = _answer(record, at, state, [None, "a", None, "b"])[::2]
    return max(
        gap(answers, _want(at, [None] * 4)[::2]),
        gap(_answer(record, at, state, [None] * 4), _want(at, [None] * 4)),
    )


def unknown(record: Server, at: World) -> float:
    """0, or infinity where a row is not named by its error or another row changes a bit.

    Args and Returns are those of `error`.
    """
    state = _started(record, at, "ab")
    answer = record.run(state, ["a", "nobody", None, "b"], at.xs)
    if list(answer.errors) != [1] or "nobody" not in str(answer.errors[1]):
        return float("inf")
    want = _answer(record, at, state, ["a", None, None, "b"])
    others = (0, 2, 3)
    same = same_bits([answer.outputs[k] for k in others], [want[k] for k in others])
    return 0.0 if same and not np.isfinite(np.asarray(answer.outputs[1])).any() else float("inf")


def unload(record: Server, at: World) -> float:
    """The largest adapter goes, the smallest takes its place in a pool that was full.

    Args and Returns are those of `error`.
    """
    state = record.unload(_started(record, at, "abc"), "a")
    answer = record.run(state, ["b", "a", "b", "b"], at.xs)
    if list(answer.errors) != [1] or not _refused(lambda: record.unload(state, "a"), "a"):
        return float("inf")
    names = ["d", "b", "c", None]
    state = record.load(state, "d", at.adapters["d"])
    return gap(_answer(record, at, state, names), _want(at, names))


def isolated(record: Server, at: World) -> float:
    """0, or infinity where a bit of a row changes while others come and go.

    Args and Returns are those of `error`.
    """
    early = _started(record, at, "ab")
    names = ["a", None, "a", "b"]
    want = _answer(record, at, early, names)
    late = record.load(early, "c", at.adapters["c"])
    seen = [_answer(record, at, late, names)]
    late = record.unload(late, "b")
    seen.append([*_answer(record, at, late, ["a", None, "a", "c"])[:3], want[3]])
    seen.append(_answer(record, at, early, names))
    return 0.0 if all(same_bits(s, want) for s in seen) else float("inf")


def swap(record: Server, at: World) -> float:
    """How often the model is traced after its first batch.

    Args and Returns are those of `error`.
    """
    traced = []

    def counted(params: tiny.Params, x: Array) -> Array:
        traced.append(1)
        return model(params, x)

    state = record.start(counted, at.params, at.empty, CAPACITY)
    state = record.load(state, "a", at.adapters["a"])
    record.run(state, ["a", None, "a", "a"], at.xs)
    first = len(traced)
    if not first:
        return float("inf")
    state = record.load(state, "b", at.adapters["b"])
    record.run(state, ["a", "b", "b", None], at.xs)
    state = record.load(record.unload(state, "a"), "c", at.adapters["c"])
    record.run(state, ["c", "nobody", "b", "c"], at.xs)
    return float(len(traced) - first)


def order(record: Server, at: World) -> float:
    """Adapters loaded in reverse.

    Args and Returns are those of `error`.
    """
    names = ["c", "a", None, "b"]
    answers = [_answer(record, at, _started(record, at, given), names) for given in ("cba", "abc")]
    return gap(*answers)


def full(record: Server, at: World) -> float:
    """0, or infinity where an adapter that does not fit is taken.

    Args and Returns are those of `error`.
    """
    state = _started(record, at, "abc")
    some = record.unload(state, "b")
    refused = (
        _refused(lambda: record.load(state, "d", at.adapters["d"]), "d"),
        _refused(lambda: record.load(some, "a", at.adapters["d"]), "a"),
        not _refused(lambda: record.load(some, "d", at.adapters["d"])),
    )
    return 0.0 if all(refused) else float("inf")


CHECKS: Mapping[str, Callable[[Server, World], float]] = {
    "rows": rows,
    "base": base,
    "unknown": unknown,
    "unload": unload,
    "isolated": isolated,
    "swap": swap,
    "order": order,
    "full": full,
}
