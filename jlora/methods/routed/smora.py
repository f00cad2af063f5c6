r"""SMoRA: one LoRA of which every token uses its own few ranks.

=============  ==========================================================================
x, y           activations [..., d_in], [..., d_out]
A, B           `a` [d_in, r], `b` [r, d_out]: every rank is an expert
R              `router` [d_in, r / partition]
l              logits [..., r]: x R, each repeated for the ranks of its partition
d              `bias` [r], balance state, frozen
k, alpha       active ranks per token; `scale` = alpha / k
=============  ==========================================================================

.. math::
    y = x W + \frac{\alpha}{k} \big( (x A) \odot k g(x) \big) B, \qquad
    g_i = \frac{s_i}{\sum_{j \in I} s_j}, \; i \in I = \mathrm{top}_k(s + d), \quad
    s = \sigma(l)

so the mean gate of the active ranks is 1; with the gate "softmax" s = softmax(l). A mixture of E
experts of rank r/E is the case of partition r/E. `bias` changes by `jlora.routing.state.advance`
after a training step, by `rate` times the sign of how far a rank is below the mean load.

Reported: `balance`, `load` [r], `counts` [r], `dropped`. ctx["mask"] leaves padding out of them.

Init: A uniform in ±1/sqrt(d_in), B = 0 (the identity); R uniform in ±1/sqrt(d_in).

Reference: Zhao et al. 2025, `SMoRA <https://arxiv.org/abs/2501.15103>`_.
Deviates: gates are the scores without the bias, so that none is 0 or below (the official code
weighs by s + d); no dropout; ranks that are not active are multiplied by 0 and not skipped.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.routed.expert_bank import real_tokens
from jlora.routing import reports
from jlora.routing.bias_balanced import BiasBalanced
from jlora.routing.router import dense_weights
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class SMoRA(Method):
    """`top_k` of `rank` ranks per token.

    Raises:
      ValueError: rank < 1, top_k not in 1..rank, a partition that does not divide the rank, an
        unknown gate, a rate below 0.
    """

    rank: int = 64
    top_k: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    partition: int = 1  # ranks that share a logit
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    rate: float = 1e-5  # of the bias

    def __post_init__(self) -> None:
        check_whole("SMoRA.rank", self.rank)
        check_whole("SMoRA.partition", self.partition)
        if not 1 <= self.top_k <= self.rank:
            raise ValueError(f"SMoRA.top_k: got {self.top_k}, expected 1..{self.rank}")
        if self.rank % self.partition:
            raise ValueError(
                f"SMoRA.partition: got {self.partition}, expected a divisor of {self.rank}"
            )
        BiasBalanced(self.top_k, self.gate, self.rate)

    @property
    def rule(self) -> BiasBalanced:
        """How ranks are chosen; `jlora.routing.state.advance` looks for it."""
        return BiasBalanced(self.top_k, self.gate, self.rate)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_in, r], b [r, d_out] = 0, router [d_in, r/partition]; frozen scale [], bias [r]."""
        ka, kr = jax.random.split(key)
        dtype, bound = site.param_dtype, 1 / math.sqrt(site.d_in)
        shape = (site.d_in, self.rank // self.partition)
        trainable = {
            "a": jax.random.uniform(ka, (site.d_in, self.rank), dtype, -bound, bound),
            "b": jnp.zeros((self.rank, site.d_out), dtype),
            "router": jax.random.uniform(kr, shape, dtype, -bound, bound),
        }
        scale = jnp.asarray(self.alpha / self.top_k, jnp.float32)
        return trainable, {"scale": scale, **self.rule.init_state(self.rank)}

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], reports)."""
        y, dtype = x @ w, x.dtype
        logits = (x @ p["router"].astype(dtype)).astype(p["router"].dtype)
        if self.partition > 1:
            logits = jnp.repeat(logits, self.partition, axis=-1)
        mask = real_tokens(ctx, logits)
        routes = self.rule.routes(logits, {"bias": p["bias"]}, "key" in ctx, mask)
        gates = dense_weights(routes.ids, self.top_k * routes.weights, self.rank)
        h = (x @ p["a"].astype(dtype)) * (p["scale"].astype(gates.dtype) * gates).astype(dtype)
        delta = h @ p["b"].astype(dtype)
        return y + delta.astype(y.dtype), reports.report(routes, mask)


SYSTEM = System(
    name="SMoRA",
    paper="Zhao 2025, 2501.15103",
    symbol="SMoRA",
    evidence="numpy value; equal to a mixture of LoRAs by blocks of ranks; loads become even",
    rows=(55,),
    claim="smora",
    examples=(SMoRA(rank=4, top_k=2, alpha=3.0, partition=2),),
    breaks={"L3": "which ranks are active depends on the activation: there is no merged weight"},
)
