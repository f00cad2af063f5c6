r"""Noise on logits: in training the choice is drawn, outside of it nothing is.

=========  ==========================================================================
l          logits [*T, E]
sigma      `scale` of the noise
n          state: how many batches were seen, which is what the draw depends on
=========  ==========================================================================

.. math:: l' = l + \sigma \epsilon_n, \quad \epsilon_n \sim N(0, 1) \; \text{in training}

and l' goes to the rule inside, whose weights are those of the noisy logits.

Reference: Shazeer et al. 2017, `Sparsely-Gated Mixture of Experts
<https://arxiv.org/abs/1701.06538>`_.
Deviates: sigma is a number, where the paper has softplus of a second projection of the token:
add that to the logits with `noisy`. The draw is a function of `seed` and n, so layers that have the
same state have the same draw.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key

from jlora.contracts.router import Router, Routes
from jlora.routing.router import TopK
from jlora.routing.rule import Rule, State


def noisy(
    key: Key[Array, ""], logits: Float[Array, "*T E"], scale: Float[Array, "*T E"] | float
) -> Array:
    """Logits with normal noise.

    Args:
      key: of the draw.
      logits: of the router.
      scale: deviation of the noise, one number or one per token and expert.

    Returns:
      [*T, E].
    """
    noise = jax.random.normal(key, logits.shape, logits.dtype)
    return logits + noise * jnp.asarray(scale, logits.dtype)


@dataclasses.dataclass(frozen=True)
class Noisy(Rule):
    """`rule` on noisy logits.

    Raises:
      ValueError: scale below 0.
    """

    rule: Rule
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"Noisy.scale: got {self.scale}, expected 0 or more")

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*self.rule.state_names, "draws")

    def init_state(self, experts: int) -> State:
        """The state of the rule inside, and "draws" [] int32.

        Args:
          experts: E.

        Returns:
          The state.
        """
        return {**self.rule.init_state(experts), "draws": jnp.zeros((), jnp.int32)}

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        if train:
            key = jax.random.fold_in(jax.random.key(self.seed), state["draws"])
            logits = noisy(key, logits, self.scale)
        return self.rule.routes(logits, state, train, mask)

    def advance(self, state: State, counts: Float[Array, "*stack E"]) -> State:
        return {**self.rule.advance(state, counts), "draws": state["draws"] + 1}


SYSTEM = Router(
    name="Noisy top-k router",
    paper="Shazeer 2017, 1701.06538",
    symbol="Noisy",
    evidence="numpy value of the draw; none outside of training; the laws of routers; a mutation",
    kind="component",
    init_state=Noisy(TopK(2)).init_state,
    route=Noisy(TopK(2)),
    breaks=dict.fromkeys(
        ("experts", "tokens", "padded"), "a draw belongs to the place of a token and an expert"
    ),
)
