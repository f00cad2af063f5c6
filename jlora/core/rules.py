"""One rule per primitive: how lazy weights pass through it.

A rule takes (scope, equation, *values) and returns the equation's outputs, or None when the
weights have to be merged for it.

Reference: JAX's primitives.
Deviates: nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.core import combine, compat, views
from jlora.core.block import mixed
from jlora.core.conv import conv
from jlora.core.evaluate import Scope, evaluate
from jlora.core.lazy import Lazy
from jlora.core.lookup import gather
from jlora.core.matmul import dot_general
from jlora.core.ragged import ragged_dot
from jlora.core.shards import all_gather, shard_map

Rule = Callable[..., list[Any] | None]


def convert(scope: Scope, eqn: Any, w: Lazy) -> list[Any] | None:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [w if dtype == w.dtype else w.replace(casts=(*w.casts, dtype))]


def same(scope: Scope, eqn: Any, *values: Any) -> list[Any]:
    """Operations that keep the value and act on where it is or on what the compiler sees."""
    values = tuple(v.opened() if isinstance(v, Lazy) else v for v in values)
    out = compat.bind(eqn, [v.base if isinstance(v, Lazy) else v for v in values])
    return [
        v.replace(base=o) if isinstance(v, Lazy) else o for v, o in zip(values, out, strict=True)
    ]


def stop_gradient(scope: Scope, eqn: Any, w: Lazy) -> list[Any]:
    return [w.replace(**jax.tree.map(lax.stop_gradient, {"own": w.own, "shared": w.shared}))]


def transpose(scope: Scope, eqn: Any, w: Lazy) -> list[Any]:
    return [_transposed(w, eqn.params["permutation"])]


def _transposed(w: Lazy, order: Sequence[int]) -> Lazy:
    w, dims = w.opened(), tuple(w.dims[k] for k in order)
    return w.replace(base=lax.transpose(w.base, order), dims=dims)


def squeeze(scope: Scope, eqn: Any, w: Lazy) -> list[Any] | None:
    return [w.squeezed(eqn.params["dimensions"])]


def dot(scope: Scope, eqn: Any, lhs: Any, rhs: Any) -> list[Any] | None:
    """A matmul with a weight; of two weights, the smaller one is merged."""
    if isinstance(lhs, Lazy) and isinstance(rhs, Lazy):
        operands = combine.product(scope, eqn, lhs, rhs)
        if operands is None:
            return None
        lhs, rhs = operands
    if not (isinstance(lhs, Lazy) or isinstance(rhs, Lazy)):
        return compat.bind(eqn, (lhs, rhs))
    return dot_general(scope, eqn, lhs, rhs)


def call(scope: Scope, eqn: Any, *values: Any) -> list[Any]:
    """Inlined; the outer jit compiles it. A `jl.block` may run once per expert instead."""
    out = mixed(scope, eqn, values)
    return evaluate(scope.inside(eqn), compat.called(eqn), values) if out is None else out


def remat(scope: Scope, eqn: Any, *values: Any) -> list[Any]:
    template = scope.fork()

    def body(*inside):
        child = template.child()
        child.inherit(values, inside)
        return evaluate(child, eqn.params["jaxpr"], inside), child.aux, child.published

    policy, cse = eqn.params["policy"], eqn.params["prevent_cse"]
    out, aux, published = jax.checkpoint(body, policy=policy, prevent_cse=cse)(*values)
    scope.join(template, aux)
    scope.publish(published)
    return out


class Carry:
    """A loop's state. A weight that every step hands on unchanged is a constant, and stays lazy."""

    def __init__(self, scope: Scope, eqn: Any, values: Sequence[Any], ins: Any, outs: Any):
        same = [isinstance(v, Lazy) and o is i for v, i, o in zip(values, ins, outs, strict=False)]
        self.free = [k for k, fixed in enumerate(same) if not fixed]
        self._all = [v if f else scope.dense(v, eqn) for v, f in zip(values, same, strict=True)]
        self.start = [self._all[k] for k in self.free]

    def full(self, free: Sequence[Any]) -> list[Any]:
        """The whole state, from the part that changes."""
        out = list(self._all)
        for k, v in zip(self.free, free, strict=True):
            out[k] = v
        return out


def scan(scope: Scope, eqn: Any, *values: Any) -> list[Any]:
    """Stacks are sliced by the scan itself; outputs that are slices handed on stay lazy too."""
    s = compat.scan(eqn)
    body, _ = compat.opened(s.body)
    consts, xs = values[: s.consts], values[s.consts + s.carry :]
    ins, outs = body.invars[s.consts :], [compat.handed_on(body, v) for v in body.outvars]
    carry = Carry(scope, eqn, values[s.consts : s.consts + s.carry], ins, outs)
    unstacked = [v.unstack(0) if isinstance(v, Lazy) else None for v in xs]
    xs = [scope.dense(v, eqn) if p is None else v for v, p in zip(xs, unstacked, strict=True)]
    fed = [v if p is None else p[0] for v, p in zip(xs, unstacked, strict=True)]
    lazy = {id(i): k for k, (i, p) in enumerate(zip(ins[s.carry :], unstacked, strict=True)) if p}
    handed = {k: lazy[id(o)] for k, o in enumerate(outs[s.carry :]) if id(o) in lazy}
    template = scope.fork(times=s.length)

    def step(c, x):
        i, x = x
        child = template.child(i)
        x = [v if p is None else p[1](v) for v, p in zip(x, unstacked, strict=True)]
        child.inherit(xs, x)
        out = evaluate(child, s.body, [*consts, *carry.full(c), *x])
        ys = [None if k in handed else child.dense(v, eqn) for k, v in enumerate(out[s.carry :])]
        return [child.dense(out[k], eqn) for k in carry.free], (ys, child.aux)

    steps = jnp.arange(s.length, dtype=jnp.int32) if "key" in scope.ctx else None
    options = {"length": s.length, "reverse": s.reverse, "unroll": s.unroll}
    last, (ys, aux) = lax.scan(step, carry.start, (steps, fed), **options)
    scope.join(template, aux)
    return [*carry.full(last), *(xs[handed[k]] if k in handed else y for k, y in enumerate(ys))]


def cond(scope: Scope, eqn: Any, index: Any, *values: Any) -> list[Any]:
    """Each branch reports what it has; what only another branch reports is zero.

    Weights that every branch returns stay lazy where they are alike, else each branch merges its
    own.
    """
    templates = [scope.fork() for _ in eqn.params["branches"]]
    walk = scope.uses is not None

    def evaluated(template, branch, inside):
        child = template.child()
        child.inherit(values, inside)
        return child, evaluate(child, branch, inside)

    found = []  # of each branch: its outputs, and whether each is fixed; only to look at
    for template, branch in zip(templates, eqn.params["branches"], strict=True):

        def look(*inside, template=template, branch=branch):
            child, out = evaluated(template, branch, inside)
            found.append([(v, child.is_fixed(v)) for v in out])

        jax.eval_shape(look, *values)
    same = [combine.one_of(outs, walk) for outs in zip(*found, strict=True)]

    def body(template, branch):
        def run(*inside):
            child, out = evaluated(template, branch, inside)
            return [combine.returned(child, eqn, v, s) for v, s in zip(out, same, strict=True)], (
                child.aux
            )

        return run

    bodies = [body(t, b) for t, b in zip(templates, eqn.params["branches"], strict=True)]
    shapes: dict[str, Any] = {}
    for run in bodies if scope.reporting else ():
        shapes.update(jax.eval_shape(run, *values)[1])

    def padded(run):
        def full(*values):
            out, aux = run(*values)
            return out, {**jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), shapes), **aux}

        return full

    out, aux = lax.switch(index, [padded(run) for run in bodies], *values)
    for k, template in enumerate(templates):
        scope.join(template, {} if k else aux)
    if walk:
        pairs = zip(out, same, strict=True)
        out = [combine.together(s, v, "cond", ()) if s else v for v, s in pairs]
    return out


def while_(scope: Scope, eqn: Any, *values: Any) -> list[Any]:
    """Raises ValueError for reports: a loop of unknown length cannot hand them on."""
    p = eqn.params
    a, b = p["cond_nconsts"], p["body_nconsts"]
    test, body = values[:a], values[a : a + b]
    inner, _ = compat.opened(p["body_jaxpr"])
    outs = [compat.handed_on(inner, v) for v in inner.outvars]
    carry = Carry(scope, eqn, values[a + b :], inner.invars[b:], outs)
    template, condition = scope.fork(), scope.fork()

    def proceed(state):
        i, c = state
        child = template.child(i)
        out = evaluate(child, p["body_jaxpr"], [*body, *carry.full(c)])
        if child.aux:
            raise ValueError(f"{[*child.aux]} report inside a while loop; lift with aux=False")
        return i + 1, [child.dense(out[k], eqn) for k in carry.free]

    def go_on(state):
        return evaluate(condition.child(), p["cond_jaxpr"], [*test, *carry.full(state[1])])[0]

    last = lax.while_loop(go_on, proceed, (jnp.zeros((), jnp.int32), carry.start))[1]
    for body_or_test in (template, condition):
        scope.join(body_or_test, {})
    return carry.full(last)


_SAME = ("copy", "copy_p", "sharding_constraint", "optimization_barrier", "name", "mesh_cast")
_VARYING = ("pvary", "pcast", "pbroadcast")  # says on which axes of a mesh devices differ

RULES: dict[str, Rule] = {
    "convert_element_type": convert,
    "stop_gradient": stop_gradient,
    "transpose": transpose,
    "reshape": views.reshape,
    "broadcast_in_dim": views.broadcast,
    "squeeze": squeeze,
    "slice": views.slice_,
    "dynamic_slice": views.dynamic_slice,
    "split": views.split,
    "unstack": views.unstack,
    "pad": views.pad,
    "rev": views.reverse,
    "tile": views.tile,
    "neg": views.negative,
    "mul": views.multiply,
    "div": views.divide,
    **dict.fromkeys(("add", "add_any", "sub"), combine.add),
    "concatenate": combine.concatenate,
    "stack": combine.stack,
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), views.identity),
    "gather": gather,
    "dot_general": dot,
    "conv_general_dilated": conv,
    **dict.fromkeys(("ragged_dot", "ragged_dot_general"), ragged_dot),
    "shard_map": shard_map,
    "all_gather": all_gather,
    "any other": combine.unknown,
    "scan": scan,
    "cond": cond,
    "while": while_,
    **dict.fromkeys((*_SAME, *_VARYING, "reshard"), same),
    **dict.fromkeys(compat.JIT, call),
    **dict.fromkeys(compat.REMAT, remat),
}
