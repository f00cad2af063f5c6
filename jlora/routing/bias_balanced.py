r"""Top-k routing that a bias per expert keeps in balance, without a balance loss.

=========  ==========================================================================
l          logits [*T, E]; scores s = sigmoid(l) or softmax(l) (`gate`)
d          state: the bias of each expert [E], 0 at the start
u          `rate` of its update
f          load [E], the share of the choices that fell on each expert
=========  ==========================================================================

.. math::
    I_t = \mathrm{top}_k(s_t + d), \qquad
    g_{t,e} = \frac{s_{t,e}}{\sum_{e' \in I_t} s_{t,e'}}, \qquad
    d_e \leftarrow d_e + u \, \mathrm{sign}(\tfrac1E \textstyle\sum_{e'} f_{e'} - f_e)

The bias chooses and does not weigh: weights are positive whatever it is. It is state, without a
gradient, and changes in training only.

Reference: Wang et al. 2024, `Auxiliary-Loss-Free Load Balancing <https://arxiv.org/abs/2408.15664>`_.
Deviates: nothing. (The code of SMoRA weighs by s + d, which may be 0 or below.)
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jlora.contracts.router import Router, Routes
from jlora.routing import reports
from jlora.routing.rule import Rule, State


def stepped(bias: Float[Array, "*stack E"], counts: Float[Array, "*stack E"], rate: float) -> Array:
    """The bias after a batch: up where an expert had less than the mean, down where more.

    Args:
      bias: before.
      counts: choices of each expert, or their share.
      rate: size of the step.

    Returns:
      [*stack, E], in the dtype of the bias.
    """
    mean = jnp.mean(counts, axis=-1, keepdims=True)
    return bias + rate * jnp.sign(mean - counts).astype(bias.dtype)


class Biased(Rule):
    """Base of rules whose state is a bias per expert; they have the fields `k` and `rate`."""

    k: int  # choices per token
    rate: float  # of the bias

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("bias",)

    def check_rate(self) -> None:
        """For `__post_init__`.

        Raises:
          ValueError: a rate below 0.
        """
        if not self.rate >= 0:
            raise ValueError(f"rate: got {self.rate}, expected 0 or more")

    def init_state(self, experts: int) -> State:
        """{"bias": zeros [E]}, float32.

        Args:
          experts: E.

        Returns:
          The state.

        Raises:
          ValueError: k not in 1..E.
        """
        if not 1 <= self.k <= experts:
            raise ValueError(f"k: got {self.k}, expected 1..{experts}")
        return {"bias": jnp.zeros(experts, jnp.float32)}

    def advance(self, state: State, counts: Float[Array, "*stack E"]) -> State:
        return {"bias": stepped(state["bias"], counts, self.rate)}


@dataclasses.dataclass(frozen=True)
class BiasBalanced(Biased):
    """`k` experts by score plus bias, weighted by their scores.

    Raises:
      ValueError: k not in 1..E; rate below 0; an unknown gate.
    """

    k: int = 2
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.gate not in ("sigmoid", "softmax"):
            raise ValueError(f"gate: got {self.gate!r}, expected 'sigmoid' or 'softmax'")
        self.check_rate()

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        kind = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}[self.gate]
        scores = kind(logits)
        bias = state["bias"].astype(scores.dtype)
        bias = bias.reshape((1,) * (scores.ndim - 1) + bias.shape)
        _, ids = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), self.k)
        weights = reports.chosen(scores, ids)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        share = scores / jnp.sum(scores, axis=-1, keepdims=True)
        return Routes(ids, weights, *reports.measure(share, ids, weights, mask))


SYSTEM = Router(
    name="Bias-balanced router",
    paper="Wang 2024, 2408.15664",
    symbol="BiasBalanced",
    evidence="numpy value; its state evens skewed loads; the laws of routers; a mutation",
    kind="component",
    init_state=BiasBalanced(rate=0.01).init_state,
    route=BiasBalanced(rate=0.01),
)
