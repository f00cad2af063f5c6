"""Which weights of an adapter a function never reads: they would stay as they are, silently.

A cast or another view of a weight does not count, only what is done with its result; a dead matmul
does, as `jl.sites` lists it.

Reference: none.
"""

from collections.abc import Iterable, Mapping, Sequence

from jlora.core import compat
from jlora.types import Dynamic

_VIEWS = (
    *("convert_element_type", "transpose", "reshape", "squeeze", "slice", "broadcast_in_dim"),
    *("stop_gradient", "copy", "copy_p", "sharding_constraint", "mesh_cast", "reshard"),
    *("optimization_barrier", "name"),
)
_BODIES = ("scan", "custom_jvp_call", "custom_vjp_call", "shard_map")  # that take what calls take


def reads(jaxpr: Dynamic, kept: Sequence[bool] | None = None) -> list[bool]:
    """Whether an operation uses each input of a jaxpr, inside of calls and loops too.

    Args:
      jaxpr: closed or open.
      kept: of each output, whether the caller uses it; None: all are used.

    Returns:
      One boolean per input.
    """
    jaxpr, _ = compat.opened(jaxpr)
    kept = [True] * len(jaxpr.outvars) if kept is None else kept
    used = {id(v) for v, keep in zip(jaxpr.outvars, kept, strict=True) if keep}
    for eqn in reversed(jaxpr.eqns):
        name, out = eqn.primitive.name, [id(v) in used for v in eqn.outvars]
        if name in compat.JIT + compat.REMAT:
            read = reads(compat.called(eqn), out)
        elif name in _BODIES:
            read = reads(compat.called(eqn))
        elif name == "cond":
            branches = [reads(branch) for branch in eqn.params["branches"]]
            read = [True, *map(any, zip(*branches, strict=True))]
        elif name in _VIEWS:
            n = len(eqn.invars)
            read = out if len(out) == n else [any(out)] * n
        else:
            read = [True] * len(eqn.invars)
        used.update(id(v) for v, m in zip(eqn.invars, read, strict=True) if m)
    return [id(v) in used for v in jaxpr.invars]


def check_reads(jaxpr: Dynamic, arrays: Mapping[str, Dynamic], sites: Iterable[str]) -> None:
    """Refuses a function that does not read all of an adapter's weights.

    Args:
      jaxpr: of the function, one input per array.
      arrays: the parameters by path, in the order of the inputs; only the paths are read.
      sites: the paths of the adapted weights.

    Raises:
      ValueError: names the weights that are not read.
    """
    is_read = dict(zip(arrays, reads(jaxpr), strict=True))
    sites = list(sites)
    out = [path for path in sites if not is_read[path]]
    if out:
        names = ", ".join(out[:8]) + (f", and {len(out) - 8} more" if len(out) > 8 else "")
        raise ValueError(
            f"the function does not read {len(out)} of the adapter's {len(sites)} weights: {names}."
            " It may hold copies of its own (a closure, a bound method): take weights from its "
            "first argument. If it needs no more than a part of them, say so with "
            "lift(fn, unread='allow')"
        )
