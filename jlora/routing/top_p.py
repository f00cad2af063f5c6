r"""Top-p routing: as many experts as it takes to hold probability p.

=========  ==========================================================================
l          logits [*T, E], with probabilities P = softmax(l)
p          `p` in (0, 1]
n_t        how many experts token t goes to, 1 ... `at_most` (0: E)
=========  ==========================================================================

.. math::
    n_t = \min \Big\{ n : \sum_{i \le n} P_{t,(i)} \ge p \Big\}, \qquad
    g_{t,(i)} = P_{t,(i)} \;\text{or, with `renormalise`,}\;
    \frac{P_{t,(i)}}{\sum_{i' \le n_t} P_{t,(i')}}, \quad i \le n_t

with (i) the experts of token t in the order of falling probability. The most probable expert is
always chosen. Renormalised, the weight of a token of one expert is 1 and has no derivative.

Reference: Huang et al. 2024, `Harder Tasks Need More Experts <https://arxiv.org/abs/2403.07652>`_;
a router of MixLoRA's code (p = 0.8).
Deviates: `at_most` bounds the experts per token, for a static shape; without it k = E.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jlora.contracts.router import Router, Routes
from jlora.routing import reports
from jlora.routing.rule import Rule, State


@dataclasses.dataclass(frozen=True)
class TopP(Rule):
    """The smallest set of experts of probability `p`.

    Raises:
      ValueError: p not in (0, 1]; at_most below 0, or above the number of experts.
    """

    p: float = 0.8
    at_most: int = 0  # experts per token; 0: all
    renormalise: bool = False  # weights that sum to 1

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"TopP.p: got {self.p}, expected in (0, 1]")
        if self.at_most < 0:
            raise ValueError(f"TopP.at_most: got {self.at_most}, expected 0 (all) or more")

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        experts = logits.shape[-1]
        if self.at_most > experts:
            raise ValueError(f"TopP.at_most: got {self.at_most}, expected 0..{experts}")
        soft = jax.nn.softmax(logits, axis=-1)
        best, ids = jax.lax.top_k(soft, self.at_most or experts)
        kept = jax.lax.stop_gradient(jnp.cumsum(best, axis=-1) - best) < self.p
        kept = kept.at[..., 0].set(True)
        weights = jnp.where(kept, best, jnp.zeros((), best.dtype))
        if self.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routes(ids, weights, *reports.measure(soft, ids, weights, mask))


SYSTEM = Router(
    name="Top-p router",
    paper="Huang 2024, 2403.07652",
    symbol="TopP",
    evidence="numpy value; p = 1 is softmax over all experts; the laws of routers; a mutation",
    kind="component",
    init_state=TopP(0.6).init_state,
    route=TopP(0.6),
    probability=jax.nn.softmax,
)
