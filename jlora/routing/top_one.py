r"""Top-1 routing, with the probability as weight or without.

=========  ==========================================================================
l          logits [*T, E], with probabilities P = softmax(l)
=========  ==========================================================================

.. math::
    e_t = \arg\max_e l_{t,e}, \qquad
    g_t = \begin{cases} P_{t,e_t} & \text{scaled (Switch)} \\ 1 & \text{else} \end{cases}

A weight of 1 has no derivative: the router then learns from the balance loss or from labels alone,
as it does with top-k renormalised at k = 1.

Reference: Fedus et al. 2022, `Switch Transformers <https://arxiv.org/abs/2101.03961>`_ (scaled);
Chen et al. 2024, `LLaVA-MoLE <https://arxiv.org/abs/2401.16160>`_ (not scaled).
Deviates: nothing.
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
class TopOne(Rule):
    """The expert of the largest logit."""

    scaled: bool = True  # by its probability

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        soft = jax.nn.softmax(logits, axis=-1)
        _, ids = jax.lax.top_k(logits, 1)
        weights = reports.chosen(soft, ids)
        weights = weights if self.scaled else jnp.ones_like(weights)
        return Routes(ids, weights, *reports.measure(soft, ids, weights, mask))


SYSTEMS = (
    Router(
        name="Top-1 router scaled by its probability",
        paper="Fedus 2021, 2101.03961",
        symbol="TopOne",
        evidence="numpy value; the laws of routers; a mutation",
        kind="component",
        init_state=TopOne().init_state,
        route=TopOne(),
        probability=jax.nn.softmax,
    ),
    Router(
        name="Top-1 router of weight 1",
        paper="Chen 2024, 2401.16160",
        symbol="TopOne",
        evidence="numpy value; no gradient but that of the balance loss",
        kind="component",
        init_state=TopOne(scaled=False).init_state,
        route=TopOne(scaled=False),
        breaks={"gradient": "the weight is 1 whatever the logits are"},
    ),
)
