r"""The balance states of a whole adapter after a training step: state in, state out.

=========  ==========================================================================
s          state of a site's rule, kept among its frozen arrays, [*stack, E]
c          counts that the site reported through `aux`, [*stack, E]
u          `advance` of the rule
=========  ==========================================================================

.. math:: s' = u(s, \textstyle\sum c)

Nothing changes inside the lifted model: a training loop takes what `lift(..., aux=True)` returned,
sums counts over microbatches and devices (under `jit` they are global sums already), and calls
`advance` once per optimizer step. Whoever only evaluates does not.

Reference: none (jlora).
"""

import functools
import operator
from collections.abc import Mapping

from jlora.core.adapter import Adapter
from jlora.routing.rule import Rule
from jlora.types import Dynamic


def advance(adapter: Adapter, aux: Mapping[str, Dynamic]) -> Adapter:
    """The adapter with the next states of its routing rules.

    Args:
      adapter: one adapter, any of whose methods have a `rule` with a state.
      aux: what `lift(..., aux=True)` reported, by path; several uses of a site are summed.

    Returns:
      The adapter; trained arrays and sites without a state stay the same objects.

    Raises:
      ValueError: a site with a state has reported nothing, or counts of another shape.
    """
    frozen = dict(adapter.frozen)
    for site, method in adapter.sites:
        rule = getattr(method, "rule", None)
        own = frozen[site.path]
        names = set(rule.state_names) & own.keys() if isinstance(rule, Rule) else set()
        if not isinstance(rule, Rule) or not names:
            continue
        uses = [r for path, r in aux.items() if path.split("#")[0] == site.path]
        if not uses or "counts" not in uses[0]:
            raise ValueError(
                f"{site.path}: no counts among the reports of {sorted(aux)}; expected those of "
                "lift(..., aux=True)"
            )
        counts = [use["counts"] for use in uses]
        for count in counts:
            if count.shape[:-1] != site.stack:
                raise ValueError(
                    f"{site.path}: got counts of shape {count.shape}, expected {site.stack} and "
                    "experts; layers of a stack have to run in a scan"
                )
        total = functools.reduce(operator.add, counts)
        state = rule.advance({name: own[name] for name in names}, total)
        frozen[site.path] = {**own, **state}
    return adapter.replace(frozen=frozen)
