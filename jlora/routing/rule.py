r"""What a routing rule is: logits and a balance state in, routes and the next state out.

=========  ==========================================================================
l          logits [*T, E]
s          state: a dict of arrays whose last axis is the experts, or of scalars; {}
m          mask [*T]: False where a token is padding
f          load [E], the share of the choices that fell on each expert
=========  ==========================================================================

.. math::
    \text{routes} = \rho(l, s, m), \qquad
    s' = \begin{cases} u(s, f) & \text{in training} \\ s & \text{else} \end{cases}

A rule is a frozen dataclass of hyper-parameters, so that a method can have one as a field. It is a
router of `jlora.contracts.router` as it is; a method inside `lift` calls `routes` alone and the
training loop calls `advance` (`jlora.routing.state`).

Reference: none (jlora).
"""

import dataclasses
from collections.abc import Mapping

from jax import Array
from jaxtyping import Bool, Float

from jlora.contracts.router import Routes
from jlora.types import Dynamic

State = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of all rules; one that remembers nothing needs `routes` alone."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of the arrays of the state."""
        return ()

    def init_state(self, experts: int) -> State:
        """The state before the first batch.

        Args:
          experts: E.

        Returns:
          Arrays by name; {} of a rule that remembers nothing.
        """
        return {}

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        """Where each token goes. The weight of a choice is 0 where the token does not go there.

        Args:
          logits: of the router.
          state: of `init_state` or `advance`.
          train: whether this is training: what is random is off otherwise.
          mask: False where a token is padding; None: no padding.

        Returns:
          The routes.
        """
        raise NotImplementedError(f"{type(self).__name__}.routes")

    def advance(self, state: State, counts: Float[Array, "*stack E"]) -> State:
        """The state after a batch of training.

        Args:
          state: before, with any stack axes in front.
          counts: choices of each expert, or their share; sum them over devices and microbatches.

        Returns:
          The next state.
        """
        return state

    def __call__(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> tuple[Routes, Dynamic]:
        """Args are those of `routes`.

        Args:
          logits: of the router.
          state: before the batch.
          train: static; the state changes in training only.
          mask: False where a token is padding.

        Returns:
          (routes, the next state).
        """
        routes = self.routes(logits, state, train, mask)
        return routes, self.advance(state, routes.load) if train else state
