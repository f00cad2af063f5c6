"""The only contact with what JAX does not promise: how a jaxpr is traced, read and re-bound.

Everything version-dependent is a small function here; the rest of the core sees plain values. (One
fault of some releases has a file of its own, `jlora.lapack`.)

Source: jax's own evaluator of jaxprs, over the releases 0.8 - 0.12.
Deviates: nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.core import Tracer
from jax.extend import core as jexc
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from jlora.types import Dynamic

try:  # the traceback's user frame, for error messages only
    from jax._src import source_info_util as _source_info
except ImportError:  # pragma: no cover
    _source_info = None

JIT = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat2", "checkpoint", "remat")


class Scan(NamedTuple):
    """The parameters of a scan equation."""

    body: Dynamic  # jaxpr of one step
    consts: int  # how many of the operands are constants
    carry: int  # how many are the carry
    length: int
    reverse: bool
    unroll: int


def trace(fn: Callable, leaves: Sequence[Dynamic]) -> tuple[Dynamic, Dynamic]:
    """Traces a function of leaves.

    Args:
      fn: of a list of arrays.
      leaves: the list; arrays, abstract ones or numbers.

    Returns:
      (closed jaxpr, tree of the shapes that `fn` returns).
    """
    return jax.make_jaxpr(fn, return_shape=True)(leaves)


def opened(jaxpr: Dynamic) -> tuple[Dynamic, Sequence[Dynamic]]:
    """A jaxpr without its constants.

    Args:
      jaxpr: closed or open.

    Returns:
      (jaxpr, constants).
    """
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def called(eqn: Dynamic) -> Dynamic:
    """The jaxpr that a call-like equation (jit, custom_jvp, ...) runs.

    Args:
      eqn: the equation.

    Returns:
      A jaxpr, closed or open.
    """
    params = eqn.params
    return next(params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)


def handed_on(jaxpr: Dynamic, var: Dynamic) -> Dynamic:
    """The variable that another one equals, where calls and checkpoints only hand it on.

    Args:
      jaxpr: an open jaxpr.
      var: one of its variables.

    Returns:
      The first variable of the chain; `var` itself where an operation made it.
    """
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


def is_literal(atom: Dynamic) -> bool:
    """Whether an operand of an equation is a constant written into it.

    Args:
      atom: the operand.

    Returns:
      False for variables.
    """
    return isinstance(atom, jexc.Literal)


def is_traced(value: Dynamic) -> bool:
    """Whether a value stands for an array of a trace that is under way.

    Args:
      value: any value.

    Returns:
      False for arrays with values.
    """
    return isinstance(value, Tracer)


def bind(eqn: Dynamic, values: Sequence[Dynamic]) -> list[Dynamic]:
    """Runs one equation on other operands, as JAX's own evaluator does.

    Args:
      eqn: the equation.
      values: one per operand.

    Returns:
      One array per output.
    """
    bound = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(bound, tuple):  # until 0.10: (functions, params)
        functions, params = bound
        out = eqn.primitive.bind(*functions, *values, **params)
    else:
        out = eqn.primitive.bind(*values, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def located(eqn: Dynamic) -> Iterator[None]:
    """The equation's own context: mesh, compute type, name stack, source line.

    Args:
      eqn: the equation.

    Yields:
      Nothing; what runs inside is run as if at the user's line.
    """
    with contextlib.ExitStack() as stack:
        if _source_info is not None:
            info = eqn.source_info
            names = _source_info.current_name_stack() + info.name_stack
            stack.enter_context(_source_info.user_context(info.traceback, name_stack=names))
        manager = getattr(getattr(eqn, "ctx", None), "manager", None)
        if manager is not None:
            stack.enter_context(manager)
        yield


def source(*eqns: Dynamic) -> str:
    """The user's line that made an equation.

    Args:
      eqns: looked at in turn, until one has a line.

    Returns:
      `file:line (function)`, or "unknown line".
    """
    if _source_info is None:
        return "unknown line"
    lines = (_source_info.summarize(eqn.source_info) for eqn in eqns)
    unknown = ("", "unknown")
    return next((line for line in lines if line not in unknown), "unknown line")


def explicit(x: Shaped[jax.Array, "*axes"]) -> bool:
    """Whether an array lies on a mesh with explicit axes, where its sharding is part of its type.

    Args:
      x: an array, traced or not.

    Returns:
      False without a mesh.
    """
    return AxisType.Explicit in getattr(jax.typeof(x).sharding.mesh, "axis_types", ())


def unbatched_barrier(x: Shaped[jax.Array, "*axes"]) -> Shaped[jax.Array, "*axes"]:
    """`jax.lax.optimization_barrier` of one array, and of its cotangent; nothing under `jax.vmap`.

    Behind a barrier, XLA's CPU gives the transposed result of a batched product a layout for which
    some of its kernels (sums of 2 or 3 terms, matrices up to 3 x 3) abort the process.

    Args:
      x: any array.

    Returns:
      x.
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


def matmul(
    x: Dynamic, m: Shaped[jax.Array, "k n"], *, thin: bool = False
) -> Shaped[jax.Array, "*lead n"]:
    """x @ m; on a mesh with explicit axes the result is sharded as x and m say.

    There JAX asks for the sharding of a product whose summed axis is sharded on both sides.

    Args:
      x: [..., k], or what stands for it.
      m: a matrix of the same dtype.
      thin: whether m has few rows or columns, and a gradient. It then enters transposed, behind a
        barrier: the product that makes its gradient is not turned into a form that XLA's CPU has no
        fast kernel for. False: a weight of the model.

    Returns:
      [..., n].
    """
    if not isinstance(x, jax.Array):
        return x @ m
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    of_x, of_m = jax.typeof(x).sharding, jax.typeof(m).sharding
    if not explicit(x):
        if thin:
            m, numbers = unbatched_barrier(m.T), (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, m, numbers)
    lead = tuple(of_x.spec[:-1]) + (None,) * (x.ndim - 1 - len(of_x.spec[:-1]))
    used = {a for entry in lead for a in (entry if isinstance(entry, tuple) else (entry,))}
    last = of_m.spec[1] if len(of_m.spec) > 1 else None
    names = last if isinstance(last, tuple) else (last,)
    last = None if used.intersection(names) else last
    out = NamedSharding(of_x.mesh, PartitionSpec(*lead, last))
    return jax.lax.dot_general(x, m, numbers, out_sharding=out)


def scan(eqn: Dynamic) -> Scan:
    """The parameters of a scan; their names changed in 0.11.

    Args:
      eqn: the equation.

    Returns:
      The parameters that the rule needs.
    """
    p = eqn.params
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:
        groups = p["ft_in"].unpack()
        consts, carry = len(groups[0]), len(groups[1])
    return Scan(p["jaxpr"], consts, carry, p["length"], p["reverse"], p["unroll"])
