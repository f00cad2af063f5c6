"""The only contact with what JAX does not promise: how a jaxpr is traced, read and re-bound.

Everything version-dependent is a small function here; the rest of the core sees plain values. (One
fault of some releases has a file of its own, `jlora.lapack`.)

Source: jax's own evaluator of jaxprs, over the releases 0.8 - 0.12.
Deviates: nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.extend import core as jexc
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

try:  # the traceback's user frame, for error messages only
    from jax._src import source_info_util as _source_info
except ImportError:  # pragma: no cover
    _source_info = None

JIT = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat2", "checkpoint", "remat")


class Scan(NamedTuple):
    """The parameters of a scan equation."""

    body: Any  # jaxpr of one step
    consts: int  # how many of the operands are constants
    carry: int  # how many are the carry
    length: int
    reverse: bool
    unroll: int


def trace(fn: Callable, leaves: Sequence[Any]) -> tuple[Any, Any]:
    """The jaxpr of `fn(leaves)` and the tree of shapes that it returns."""
    return jax.make_jaxpr(fn, return_shape=True)(leaves)


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """`(jaxpr, constants)` of a jaxpr, closed or open."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def called(eqn: Any) -> Any:
    """The jaxpr that a call-like equation (jit, custom_jvp, ...) runs."""
    params = eqn.params
    return next(params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)


def handed_on(jaxpr: Any, var: Any) -> Any:
    """The variable that `var` of a jaxpr is, where calls and checkpoints only hand it on."""
    makers = {id(v): (eqn, k) for eqn in jaxpr.eqns for k, v in enumerate(eqn.outvars)}
    while id(var) in makers:
        eqn, k = makers[id(var)]
        if eqn.primitive.name not in JIT + REMAT:
            break
        inner, _ = opened(called(eqn))
        source = handed_on(inner, inner.outvars[k])
        at = next((n for n, v in enumerate(inner.invars) if v is source), None)
        if at is None:
            break
        var = eqn.invars[at]
    return var


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jexc.Literal)


def is_traced(value: Any) -> bool:
    """Whether a value stands for an array of a trace that is under way."""
    return isinstance(value, Tracer)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on other operands, as JAX's own evaluator does."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(bound, tuple):  # until 0.10: (functions, params)
        functions, params = bound
        out = eqn.primitive.bind(*functions, *values, **params)
    else:
        out = eqn.primitive.bind(*values, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def located(eqn: Any) -> Iterator[None]:
    """The equation's own context: mesh, compute type, name stack, source line."""
    with contextlib.ExitStack() as stack:
        if _source_info is not None:
            info = eqn.source_info
            names = _source_info.current_name_stack() + info.name_stack
            stack.enter_context(_source_info.user_context(info.traceback, name_stack=names))
        manager = getattr(getattr(eqn, "ctx", None), "manager", None)
        if manager is not None:
            stack.enter_context(manager)
        yield


def source(*eqns: Any) -> str:
    """`file:line (function)` of the user's line that made the first equation that has one."""
    if _source_info is None:
        return "unknown line"
    lines = (_source_info.summarize(eqn.source_info) for eqn in eqns)
    unknown = ("", "unknown")
    return next((line for line in lines if line not in unknown), "unknown line")


def explicit(x: jax.Array) -> bool:
    """Whether `x` lies on a mesh with explicit axes, where its sharding is part of its type."""
    return AxisType.Explicit in getattr(jax.typeof(x).sharding.mesh, "axis_types", ())


def unbatched_barrier(x: jax.Array) -> jax.Array:
    """`jax.lax.optimization_barrier` of one array, and of its cotangent; nothing under `jax.vmap`.

    Behind a barrier, XLA's CPU gives the transposed result of a batched product a layout for which
    some of its kernels (sums of 2 or 3 terms, matrices up to 3 x 3) abort the process.
    """
    return _unbatched_barrier.bind(x)


_unbatched_barrier = jexc.Primitive("unbatched_barrier")
_unbatched_barrier.def_impl(jax.lax.optimization_barrier)
_unbatched_barrier.def_abstract_eval(lambda x: x)
mlir.register_lowering(
    _unbatched_barrier, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
)
ad.deflinear2(_unbatched_barrier, lambda cotangent, _: [_unbatched_barrier.bind(cotangent)])
batching.primitive_batchers[_unbatched_barrier] = lambda values, axes: (values[0], axes[0])


def matmul(x: Any, m: jax.Array, *, thin: bool = False) -> jax.Array:
    """x [..., k] @ m [k, n]; on a mesh with explicit axes the result is sharded as x and m say.

    There JAX asks for the sharding of a product whose summed axis is sharded on both sides.
    `thin`: m has few rows or columns, and a gradient. It enters transposed, behind a barrier: the
    product that makes its gradient is then not turned into a form XLA's CPU has no fast kernel for.
    """
    if not isinstance(x, jax.Array):
        return x @ m
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    mine, other = jax.typeof(x).sharding, jax.typeof(m).sharding
    if not explicit(x):
        if thin:
            m, numbers = unbatched_barrier(m.T), (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, m, numbers)
    lead = tuple(mine.spec[:-1]) + (None,) * (x.ndim - 1 - len(mine.spec[:-1]))
    used = {a for entry in lead for a in (entry if isinstance(entry, tuple) else (entry,))}
    last = other.spec[1] if len(other.spec) > 1 else None
    names = last if isinstance(last, tuple) else (last,)
    last = None if used.intersection(names) else last
    out = NamedSharding(mine.mesh, PartitionSpec(*lead, last))
    return jax.lax.dot_general(x, m, numbers, out_sharding=out)


def scan(eqn: Any) -> Scan:
    """The parameters of a scan; their names changed in 0.11."""
    p = eqn.params
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:
        groups = p["ft_in"].unpack()
        consts, carry = len(groups[0]), len(groups[1])
    return Scan(p["jaxpr"], consts, carry, p["length"], p["reverse"], p["unroll"])
