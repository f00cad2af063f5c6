"""The evaluator: a jaxpr run on values of which some are lazy weights.

Equations that touch no lazy weight are bound as they are. The others go to the rule of their
primitive; where there is none, or it declines, the weight would have to be merged.

Original to jlora (an evaluator of jaxprs, as JAX's documentation describes it).
Deviates: nothing.
"""

from collections.abc import Sequence
from typing import Any

from jlora.core import compat
from jlora.core.lazy import Lazy
from jlora.core.scope import DenseWeightError as DenseWeightError
from jlora.core.scope import Scope as Scope


def evaluate(scope: Scope, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr on values of which some are lazy; lazy ones may come out."""
    jaxpr, consts = compat.opened(jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with compat.located(eqn):
            out = None
            if any(isinstance(v, Lazy) for v in values):
                rule = scope.rules.get(eqn.primitive.name)
                out = rule(scope, eqn, *values) if rule else None
                if out is None and scope.uses is not None:
                    out = scope.rules["any other"](scope, eqn, *values)
            if out is None:
                out = compat.bind(eqn, [scope.dense(v, eqn) for v in values])
            scope.keep(values, out)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
