"""Which weights of an adapter a function never reads: they would stay as they are, silently.

A cast or another view of a weight does not count, only what is done with its result; a dead matmul
does, as `jl.sites` lists it.

Reference: none.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jlora.core import compat

_VIEWS = (
    *("convert_element_type", "transpose", "reshape", "squeeze", "slice", "broadcast_in_dim"),
    *("stop_gradient", "copy", "copy_p", "sharding_constraint", "mesh_cast", "reshard"),
    *("optimization_barrier", "name"),
)
_BODIES = ("scan", "custom_jvp_call", "custom_vjp_call", "shard_map")  # that take what calls take


def reads(jaxpr: Any, kept: Sequence[bool] | None = None) -> list[bool]:
    """Of each input of a jaxpr: whether an operation uses it, inside of calls and loops too.

    `kept`: of each output, whether the caller uses it; None: all.
    """
    jaxpr, _ = compat.opened(jaxpr)
    kept = [True] * len(jaxpr.outvars) if kept is None else kept
    used = {id(v) for v, keep in zip(jaxpr.outvars, kept, strict=True) if keep}
    for eqn in reversed(jaxpr.eqns):
        name, out = eqn.primitive.name, [id(v) in used for v in eqn.outvars]
        if name in compat.JIT + compat.REMAT:
            mine = reads(compat.called(eqn), out)
        elif name in _BODIES:
            mine = reads(compat.called(eqn))
        elif name == "cond":
            branches = [reads(branch) for branch in eqn.params["branches"]]
            mine = [True, *map(any, zip(*branches, strict=True))]
        elif name in _VIEWS:
            n = len(eqn.invars)
            mine = out if len(out) == n else [any(out)] * n
        else:
            mine = [True] * len(eqn.invars)
        used.update(id(v) for v, m in zip(eqn.invars, mine, strict=True) if m)
    return [id(v) in used for v in jaxpr.invars]


def check_reads(jaxpr: Any, arrays: Mapping[str, Any], sites: Iterable[str]) -> None:
    """Raises ValueError where a function of `arrays` does not read all of `sites`."""
    read = dict(zip(arrays, reads(jaxpr), strict=True))
    sites = list(sites)
    out = [path for path in sites if not read[path]]
    if out:
        names = ", ".join(out[:8]) + (f", and {len(out) - 8} more" if len(out) > 8 else "")
        raise ValueError(
            f"the function does not read {len(out)} of the adapter's {len(sites)} weights: {names}."
            " It may hold copies of its own (a closure, a bound method): take weights from its "
            "first argument. If it needs no more than a part of them, say so with "
            "lift(fn, unread='allow')"
        )
