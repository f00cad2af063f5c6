r"""MeteoRA: many adapters that exist already, and at every weight a gate that picks some per token.

=============  ==========================================================================
x, y           activations [..., d_in], [..., d_out]
A_e, B_e, s_e  `a` [E, d_in, r], `b` [E, r, d_out], `scales` [E]: the adapters, frozen
G              `gate` [d_in, E], what is trained
k, tau         adapters per token, temperature of their weights
c              ctx["labels"] [...], int: the task of each token, below 0: unknown; optional
=============  ==========================================================================

.. math::
    y = x W + \sum_{e \in I(x)} g_e(x) \, s_e \, x A_e B_e, \qquad
    g(x) = \mathrm{softmax}_{I(x)}(x G / \tau), \quad I(x) = \mathrm{top}_k(x G)

.. math:: L_{label} = \text{cross entropy of } \mathrm{softmax}(x G) \text{ with } c

A token's gates know nothing of other tokens, so a sequence that turns from one task to another
changes adapters where it turns. With k = 1 the weight is 1 and gates learn from `label_loss` alone.
`with_experts` of `jlora.methods.routed.expert_bank` puts adapters in.

Reported: `balance`, `load` [E], `counts` [E], `dropped`, and with labels `label_loss`, to be added
to the loss (the paper: the sum over gates, times 50). ctx["mask"] leaves padding out of them.

Init: gate uniform in ±1/sqrt(d_in); the experts as `Experts`, until others are put in.

Reference: Xu et al. 2024, `MeteoRA <https://arxiv.org/abs/2405.13053>`_.
Deviates: adapters are frozen, as in the paper (the official script trains them too:
`train_experts`); three dispatch back-ends of `jlora.routing.dispatch`, of which "gather" is theirs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.routed.expert_bank import new_experts, real_tokens, token_labels
from jlora.routing import dispatch, reports
from jlora.routing.labels import label_loss
from jlora.routing.router import TopK
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class MeteoRA(Method):
    """`experts` frozen adapters of rank `rank` or less, `top_k` of them per token.

    Raises:
      ValueError: rank < 1, top_k not in 1..experts, a temperature not above 0, an unknown back-end.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    experts: int = 28
    top_k: int = 2
    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    temperature: float = 1.0
    train_experts: bool = False
    backend: str = "dense"

    def __post_init__(self) -> None:
        check_whole("MeteoRA.rank", self.rank)
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"MeteoRA.top_k: got {self.top_k}, expected 1..{self.experts}")
        if not self.temperature > 0:
            raise ValueError(f"MeteoRA.temperature: got {self.temperature}, expected above 0")
        if self.backend not in dispatch.BACKENDS:
            raise ValueError(
                f"MeteoRA.backend: got {self.backend!r}, expected one of {dispatch.BACKENDS}"
            )

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """gate [d_in, E]; a, b (trainable with `train_experts`, else frozen); frozen scales [E]."""
        ka, kg = jax.random.split(key)
        dtype, bound = site.param_dtype, 1 / math.sqrt(site.d_in)
        gate = jax.random.uniform(kg, (site.d_in, self.experts), dtype, -bound, bound)
        experts = new_experts(ka, site, self.experts, self.rank)
        scales = jnp.full(self.experts, self.alpha / self.rank, jnp.float32)
        if self.train_experts:
            return {"gate": gate, **experts}, {"scales": scales}
        return {"gate": gate}, {"scales": scales, **experts}

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], reports)."""
        y = x @ w
        logits = (x @ p["gate"].astype(x.dtype)).astype(p["gate"].dtype)
        mask = real_tokens(ctx, logits)
        routes = TopK(self.top_k).routes(logits, {}, "key" in ctx, mask)
        report = reports.report(routes, mask)
        labels = token_labels(ctx, logits)
        if labels is not None:
            report["label_loss"] = label_loss(logits, labels, mask)
        weights = routes.weights
        if self.temperature != 1:
            best = reports.chosen(logits, routes.ids)
            weights = jax.nn.softmax(best / self.temperature, axis=-1)
        scales = p["scales"].astype(weights.dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
        weights = weights * reports.chosen(scales, routes.ids)
        delta = dispatch.dispatch(x, p["a"], p["b"], routes.ids, weights, self.backend)
        return y + delta.astype(y.dtype), report


SYSTEM = System(
    name="MeteoRA",
    paper="Xu 2024, 2405.13053",
    symbol="MeteoRA",
    evidence="numpy value; equal back-ends; gates learn from labels and switch inside a sequence",
    rows=(61,),
    claim="meteora",
    more_claims=("meteora_sequence", "meteora_time"),
    examples=(MeteoRA(experts=3, top_k=2, rank=2, temperature=2.0, train_experts=True),),
    breaks={"L3": "the delta depends on the activation, so there is no merged weight"},
)
