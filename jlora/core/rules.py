"""One rule per primitive: how lazy weights pass through it.

A rule takes (scope, equation, *values) and returns the equation's outputs, or None when the
weights have to be merged for it.

Reference: JAX's primitives.
Deviates: nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jlora.core import combine, compat, scaling, views
from jlora.core.block import mixed
from jlora.core.conv import conv
from jlora.core.evaluate import Scope, evaluate
from jlora.core.lazy import Lazy
from jlora.core.lookup import gather
from jlora.core.matmul import dot_general
from jlora.core.ragged import ragged_dot
from jlora.core.scope import Rule
from jlora.core.shards import all_gather, shard_map
from jlora.types import Dynamic


def convert(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of a cast to a floating dtype.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [w if dtype == w.dtype else w.replace(casts=(*w.casts, dtype))]


def same(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic]:
    """The rule of operations that keep the value, such as copies and sharding constraints.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    values = tuple(v.opened() if isinstance(v, Lazy) else v for v in values)
    out = compat.bind(eqn, [v.base if isinstance(v, Lazy) else v for v in values])
    return [
        v.replace(base=o) if isinstance(v, Lazy) else o for v, o in zip(values, out, strict=True)
    ]


def stop_gradient(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic]:
    """The rule of `jax.lax.stop_gradient`: the base and the arrays of the method have none.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    return [w.replace(**jax.tree.map(lax.stop_gradient, {"own": w.own, "shared": w.shared}))]


def transpose(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic]:
    """The rule of a permutation of axes.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    return [_transposed(w, eqn.params["permutation"])]


def _transposed(w: Lazy, order: Sequence[int]) -> Lazy:
    w, dims = w.opened(), tuple(w.dims[k] for k in order)
    return w.replace(base=lax.transpose(w.base, order), dims=dims)


def squeeze(scope: Scope, eqn: Dynamic, w: Lazy) -> list[Dynamic] | None:
    """The rule of taking away axes of size one.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    return [w.squeezed(eqn.params["dimensions"])]


def dot(scope: Scope, eqn: Dynamic, lhs: Dynamic, rhs: Dynamic) -> list[Dynamic] | None:
    """The rule of a matmul with a weight; of two weights, the smaller one is merged.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    if isinstance(lhs, Lazy) and isinstance(rhs, Lazy):
        operands = combine.product(scope, eqn, lhs, rhs)
        if operands is None:
            return None
        lhs, rhs = operands
    if not (isinstance(lhs, Lazy) or isinstance(rhs, Lazy)):
        return compat.bind(eqn, (lhs, rhs))
    return dot_general(scope, eqn, lhs, rhs)


def call(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic]:
    """The rule of a call: inlined; the outer jit compiles it. A `jl.block` may run once per expert.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    out = mixed(scope, eqn, values)
    return evaluate(scope.inside(eqn), compat.called(eqn), values) if out is None else out


def remat(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic]:
    """The rule of `jax.checkpoint`, with the model's own policy.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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

    def __init__(
        self, scope: Scope, eqn: Dynamic, values: Sequence[Dynamic], ins: Dynamic, outs: Dynamic
    ):
        same = [isinstance(v, Lazy) and o is i for v, i, o in zip(values, ins, outs, strict=False)]
        self.free = [k for k, fixed in enumerate(same) if not fixed]
        self._all = [v if f else scope.dense(v, eqn) for v, f in zip(values, same, strict=True)]
        self.start = [self._all[k] for k in self.free]

    def full(self, free: Sequence[Dynamic]) -> list[Dynamic]:
        """The whole state, from the part that changes.

        Args:
          free: the values that change, in the order of `self.free`.

        Returns:
          All values of the state, lazy constants among them.
        """
        out = list(self._all)
        for k, v in zip(self.free, free, strict=True):
            out[k] = v
        return out


def scan(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic]:
    """The rule of a scan: it slices stacks itself; outputs that are slices handed on stay lazy too.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
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


def cond(scope: Scope, eqn: Dynamic, index: Dynamic, *values: Dynamic) -> list[Dynamic]:
    """The rule of branches: each reports what it has; what only another branch reports is zero.

    Weights that every branch returns stay lazy where they are alike, else each branch merges its
    own.

    Args and Returns are those of `jlora.core.scope.Rule`.
    """
    templates = [scope.fork() for _ in eqn.params["branches"]]
    walk = scope.uses is not None

    def evaluated(template, branch, inside):
        child = template.child()
        child.inherit(values, inside)
        return child, evaluate(child, branch, inside)

    branches = []  # of each branch: its outputs, and whether each is fixed; only to look at
    for template, branch in zip(templates, eqn.params["branches"], strict=True):

        def look(*inside, template=template, branch=branch):
            child, out = evaluated(template, branch, inside)
            branches.append([(v, child.is_fixed(v)) for v in out])

        jax.eval_shape(look, *values)
    same = [combine.one_of(outs, walk) for outs in zip(*branches, strict=True)]

    def body(template, branch):
        def run(*inside):
            child, out = evaluated(template, branch, inside)
            return [combine.returned(child, eqn, v, s) for v, s in zip(out, same, strict=True)], (
                child.aux
            )

        return run

    bodies = [body(t, b) for t, b in zip(templates, eqn.params["branches"], strict=True)]
    shapes: dict[str, Dynamic] = {}
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


def while_(scope: Scope, eqn: Dynamic, *values: Dynamic) -> list[Dynamic]:
    """The rule of a loop of unknown length.

    Args and Returns are those of `jlora.core.scope.Rule`.

    Raises:
      ValueError: a method reports inside, which such a loop cannot hand on.
    """
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
    "neg": scaling.negative,
    "mul": scaling.multiply,
    "div": scaling.divide,
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
