"""`shard_map`: each device has its part of a weight, and of what the adapter adds to it.

The factors lie on the mesh as the weight's rows, columns and stack axes do; what they are given
is V, so the product is local, as the model's own:

.. math:: (W + u v)_{IJ} = W_{IJ} + u_I v_J

Cost: where a stack alone is partitioned (experts), every method runs on its slices. Where rows or
columns are, methods without factors merge the whole weight first.

Reference: none; `jax.shard_map` is what it runs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jlora.core import compat
from jlora.core.evaluate import evaluate
from jlora.core.grid import Grid, delta, reads_context, rebuilt
from jlora.core.lazy import Lazy
from jlora.core.scope import Scope
from jlora.core.views import Moves, seen, view
from jlora.types import Dynamic


class Part(NamedTuple):
    """An operand of a `shard_map`: what enters it, and what it is inside."""

    arrays: Dynamic  # a PyTree
    specs: Dynamic  # the same tree of PartitionSpec
    inside: Callable[
        [Dynamic, Dynamic], Dynamic
    ]  # (scope, the arrays of one device) -> the operand


def shard_map(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic] | None:
    """The rule of `jax.shard_map`: the body on parts of weights; outputs of the body are dense.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    p = eqn.params
    manual = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    sharded = [_part(scope, eqn, v, s) for v, s in zip(values, p["in_specs"], strict=True)]
    parts = [part for part in sharded if part is not None]
    if len(parts) < len(sharded):
        return None
    devices = math.prod(p["mesh"].shape[name] for name in manual)
    # no method in here reads side inputs, and the devices' program must not hold them
    template = dataclasses.replace(scope, ctx={}).fork(devices)

    def body(*arrays):
        child = template.child()
        inside = [part.inside(child, t) for part, t in zip(parts, arrays, strict=True)]
        child.inherit(values, inside)
        return [child.dense(v, eqn) for v in evaluate(child, p["jaxpr"], inside)]

    run = jax.shard_map(
        body, mesh=p["mesh"], in_specs=tuple(part.specs for part in parts),
        out_specs=list(p["out_specs"]), axis_names=set(manual), check_vma=p["check_vma"],
    )  # fmt: skip
    out = run(*(part.arrays for part in parts))
    scope.join(template, {})
    return out


def _part(scope: Scope, eqn: Dynamic, v: Dynamic, spec: Dynamic) -> Part | None:
    if not isinstance(v, Lazy):
        return Part(v, spec, lambda scope, t: t)
    if scope.uses is not None:
        axes = range(v.ndim)
        return Part(v.view(), spec, lambda scope, t: seen(v, t, "shard_map", axes))
    if v.method is None or "i" not in v.site.kinds:
        return Part(scope.dense(v, eqn), spec, lambda scope, t: t)
    if reads_context(scope, v):
        return None
    entries = (*spec, *(None for _ in range(v.ndim - len(spec))))
    whole = _slices(v, spec, entries)
    if whole is not None:
        return whole
    low_rank = delta(scope, v)
    if not isinstance(low_rank, Grid):
        return None if low_rank is None else Part(low_rank, spec, lambda scope, t: t)

    def along(other):
        return PartitionSpec(
            *(None if k in (other, "") else e for k, e in zip(low_rank.kinds, entries, strict=True))
        )

    return Part(
        (v.view(), low_rank.u, low_rank.v),
        (spec, along("o"), along("i")),
        lambda scope, t: rebuilt(scope, v, t[0], low_rank._replace(u=t[1], v=t[2])),
    )


def _slices(w: Lazy, spec: Dynamic, entries: Sequence[Dynamic]) -> Part | None:
    """Slices of a stack, with their methods; None where another axis is partitioned too."""
    w = w.opened()
    cut = [k for k, entry in enumerate(entries) if entry not in (None, ())]
    if any(len(w.dims[k]) != 1 or not w.stacks(k) for k in cut):
        return None
    where = {w.dims[k][0]: entries[k] for k in cut}
    own = PartitionSpec(*(where.get(a) for a in w.of("s")))

    def inside(_, arrays):
        base, own, shared = arrays
        sizes = {w.dims[k][0]: base.shape[k] for k in cut}
        atoms = tuple(a._replace(size=sizes.get(n, a.size)) for n, a in enumerate(w.atoms))
        return w.replace(base=base, own=own, shared=shared, atoms=atoms)

    arrays = (w.base, w.own, w.shared)
    return Part(arrays, (spec, own, PartitionSpec()), inside)


def all_gather(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of joining all devices' parts of a weight along one of its axes.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    p = eqn.params
    if not p["tiled"]:
        return None
    options = {"axis_index_groups": p["axis_index_groups"], "tiled": True}
    moves: Moves = {
        p["all_gather_dimension"]: lambda t, k: lax.all_gather(t, p["axis_name"], axis=k, **options)
    }
    return view(scope, w, "all_gather", lambda t: compat.bind(eqn, (t,)), [moves])
