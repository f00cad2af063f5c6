"""The evaluator: a jaxpr run on values of which some are lazy weights.

Equations that touch no lazy weight are bound as they are. The others go to the rule of their
primitive; where there is none, or it declines, the weight would have to be merged.

Original to jlora (an evaluator of jaxprs, as JAX's documentation describes it).
Deviates: nothing.
"""

from collections.abc import Sequence

from jlora.core import compat
from jlora.core.lazy import Lazy
from jlora.core.scope import DenseWeightError as DenseWeightError
from jlora.core.scope import Scope as Scope
from jlora.types import Dynamic


def evaluate(scope: Scope, jaxpr: Dynamic, args: Sequence[Dynamic]) -> list[Dynamic]:
    """The outputs of a jaxpr on values of which some are lazy weights.

    Args:
      scope: of the trace; its record is extended by what happens.
      jaxpr: closed or open.
      args: one value per input of the jaxpr, `Lazy` or an array.

    Returns:
      One value per output; lazy ones may come out.

    Raises:
      DenseWeightError: an operation needs a weight merged, and `scope.on_dense` is "error".
    """
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
