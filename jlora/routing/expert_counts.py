r"""Fewer experts in some layers than in others, in one scan: the missing ones are padding.

=========  ==========================================================================
l          logits [*T, E] of E experts, the most that any layer has
N          how many experts there are in this layer, the first N of E
=========  ==========================================================================

.. math::
    l'_e = \begin{cases} l_e & e < N \\ -\infty & \text{else} \end{cases}, \qquad
    L_{balance} = N \sum_{e < N} f_e P_e

so that routes, balance and gradients are those of a layer of N experts, for any rule that chooses
at most N. The balance is 1 where the N experts are even, in every layer.

Reference: Gao et al. 2024, `MoLA <https://arxiv.org/abs/2402.08562>`_.
Deviates: nothing (the official code has one module per layer, which is the same sum).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jlora.contracts.router import Router, Routes
from jlora.routing.router import TopK
from jlora.routing.rule import Rule, State


def within(
    rule: Rule,
    logits: Float[Array, "*T E"],
    count: Int[Array, ""] | int,
    state: State,
    train: bool,
    mask: Bool[Array, "*T"] | None = None,
) -> Routes:
    """The routes of a layer that has the first `count` of E experts.

    Args:
      rule: any that chooses at most `count` experts.
      logits: of all E.
      count: N, as data.
      state: of the rule.
      train: whether this is training.
      mask: False where a token is padding.

    Returns:
      Routes with a load of E numbers, 0 from N on.
    """
    experts = logits.shape[-1]
    there = jnp.arange(experts, dtype=jnp.int32) < count
    there = there.reshape((1,) * (logits.ndim - 1) + (experts,))
    routes = rule.routes(jnp.where(there, logits, -jnp.inf), state, train, mask)
    share = jnp.asarray(count, logits.dtype) / experts
    return routes._replace(balance=routes.balance * share.astype(routes.balance.dtype))


@dataclasses.dataclass(frozen=True)
class FirstExperts(Rule):
    """`rule` among the first `count` experts.

    Raises:
      ValueError: a rule with a state, of which experts that are not there would be a part.
    """

    rule: Rule
    count: int

    def __post_init__(self) -> None:
        if self.rule.state_names:
            raise ValueError(f"FirstExperts.rule: got {self.rule}, expected one without a state")

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        return within(self.rule, logits, self.count, state, train, mask)


SYSTEM = Router(
    name="Routing among the first experts",
    paper="Gao 2024, 2402.08562",
    symbol="FirstExperts",
    evidence="padded equals ragged in value and gradient; the laws of routers; a mutation",
    kind="component",
    init_state=FirstExperts(TopK(2), 4).init_state,
    route=FirstExperts(TopK(2), 4),
    breaks={"experts": "an expert that is not there is known by its place"},
)
