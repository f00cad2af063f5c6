r"""Capacity: an expert takes so many tokens and no more; choices over it are dropped.

=========  ==========================================================================
I, g       ids and weights [*T, k] of another rule
C          `limit`, tokens per expert
q_{t,j}    how many choices of the same expert come before choice j of token t
=========  ==========================================================================

.. math:: g'_{t,j} = g_{t,j} \, [q_{t,j} < C]

The order of the queue is that of the weights, largest first, or with `first_come` that of the
tokens, all first choices before all second ones. A dropped choice has weight 0 and nothing takes
its place: a token all of whose choices are dropped passes through the base alone. Padding stands in
no queue. The balance loss is that of the choices before any is dropped, the load that of what is
kept.

Reference: Fedus et al. 2022, `Switch Transformers <https://arxiv.org/abs/2101.03961>`_
(`first_come`); Riquelme et al. 2021, `V-MoE <https://arxiv.org/abs/2106.05974>`_ (by weight).
Deviates: the limit is given as tokens, not as a factor of T k / E, so that padding changes nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jlora.contracts.router import Router, Routes
from jlora.core.checks import check_whole
from jlora.routing import reports
from jlora.routing.rule import Rule, State
from jlora.routing.top_one import TopOne


@dataclasses.dataclass(frozen=True)
class Capacity(Rule):
    """The choices of `rule`, as far as the experts have room.

    Raises:
      ValueError: limit below 1.
    """

    rule: Rule
    limit: int
    first_come: bool = False

    def __post_init__(self) -> None:
        check_whole("Capacity.limit", self.limit)

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.rule.state_names

    def init_state(self, experts: int) -> State:
        """As the rule inside.

        Args:
          experts: E.

        Returns:
          Its state.
        """
        return self.rule.init_state(experts)

    def advance(self, state: State, counts: Float[Array, "*stack E"]) -> State:
        return self.rule.advance(state, counts)

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        routes = self.rule.routes(logits, state, train, mask)
        ids, weights, experts = routes.ids, routes.weights, logits.shape[-1]
        asks = weights > 0 if mask is None else (weights > 0) & mask[..., None]
        k = ids.shape[-1]
        # [k, T] flattened: all first choices come before all second ones
        flat = lambda t: t.reshape(-1, k).T.reshape(-1)  # noqa: E731
        by = jnp.where(flat(asks), flat(weights), -jnp.ones((), weights.dtype))
        by = jnp.arange(by.size) if self.first_come else -jax.lax.stop_gradient(by)
        order = jnp.argsort(by, stable=True)
        real = flat(asks).astype(jnp.int32)[:, None]
        hot = jax.nn.one_hot(flat(ids), experts, dtype=jnp.int32) * real
        queue = jnp.cumsum(hot[order], axis=0) - hot[order]
        before = jnp.zeros(by.shape, jnp.int32).at[order].set(jnp.sum(queue * hot[order], axis=-1))
        room = (before < self.limit).reshape(k, -1).T.reshape(ids.shape)
        weights = jnp.where(room, weights, jnp.zeros((), weights.dtype))
        count = reports.counts(ids, weights, experts, mask)
        load = count / jnp.maximum(jnp.sum(count), jnp.ones((), count.dtype))
        return Routes(ids, weights, routes.balance, load)


def _record(name: str, paper: str, first_come: bool) -> Router:
    rule = Capacity(TopOne(), 2, first_come)
    reason = "who comes first is a matter of their order"
    return Router(
        name=name,
        paper=paper,
        symbol="Capacity",
        evidence="numpy loop over queues; no limit reached is the rule inside; a mutation",
        kind="component",
        init_state=rule.init_state,
        route=rule,
        probability=jax.nn.softmax,
        breaks={"tokens": reason} if first_come else {},
    )


SYSTEMS = (
    _record("Capacity, first come", "Fedus 2021, 2101.03961", True),
    _record("Capacity by weight", "Riquelme 2021, 2106.05974", False),
)
