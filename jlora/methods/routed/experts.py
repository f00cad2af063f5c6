"""Routed LoRA experts: every token picks k of E low-rank deltas and mixes them.

Symbols: A_e, B_e -> `a` [E, d_in, r], `b` [E, r, d_out]; router R -> `router` [d_in, E];
s = alpha / rank -> `scale`; k -> `top_k`.

.. math::
    y = x W + s \\sum_{e \\in I(x)} g_e(x) \\; x A_e B_e, \\qquad
    g(x) = \\mathrm{softmax}_{I(x)}(x R), \\quad I(x) = \\mathrm{top}_k(x R)

With `decision` the sites of a block share one router: the first of them, which `router` matches,
decides and publishes g, and the later ones of the same scope read it. The delta depends on x, so
there is no merged weight. Reported through `aux`: `balance`, the scalar
of `routing.router` to be added to the loss with a small weight, and `load` [E].

Init: A_e uniform in ±1/sqrt(d_in), B_e = 0 (the identity); R ~ N(0, 0.02^2), not zero, because ties
would send every token to the first k experts. With top_k = 1 the weight is 1 and the router learns
from `balance` alone.

Dou et al., `LoRAMoE <https://arxiv.org/abs/2312.09979>`_, 2023; Gao et al., `Higher Layers Need
More LoRA Experts (MoLA) <https://arxiv.org/abs/2402.08562>`_, 2024.

Source: MoLA's official code (softmax, top-2, renormalised; a router without bias a kernel).
Deviates: the balance loss is Switch's; three dispatch back-ends that agree.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.routing import dispatch, router
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Experts(Method):
    """`experts` LoRA experts of rank `rank`, `top_k` a token; back-ends in `routing.dispatch`.

    Raises:
      ValueError: rank < 1, top_k not in 1..experts, an unknown back-end.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    experts: int = 8
    top_k: int = 2
    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    backend: str = "dense"
    decision: str = ""  # name under which sites of one scope share a router; "": each has its own
    router: str = ""  # with `decision`: regex on paths, the sites that have a router

    def __post_init__(self) -> None:
        check_whole("Experts.rank", self.rank)
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"Experts.top_k: expected in 1..{self.experts}, got {self.top_k}")
        if self.backend not in dispatch.BACKENDS:
            raise ValueError(
                f"Experts.backend: expected one of {dispatch.BACKENDS}, got {self.backend!r}"
            )

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """router [d_in, E], a [E, d_in, r], b [E, r, d_out] = 0; frozen scale []."""
        ka, kr = jax.random.split(key)
        e, r, dtype, bound = self.experts, self.rank, site.param_dtype, 1 / math.sqrt(site.d_in)
        trainable = {
            "a": jax.random.uniform(ka, (e, site.d_in, r), dtype, -bound, bound),
            "b": jnp.zeros((e, r, site.d_out), dtype),
        }
        if not self.decision or re.search(self.router, site.path):
            trainable["router"] = 0.02 * jax.random.normal(kr, (site.d_in, e), dtype)
        return trainable, {"scale": jnp.asarray(self.alpha / r, dtype)}

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], {"balance": [], "load": [E]}); shared: published, read.

        Raises:
          ValueError: no site before this one in its scope made the decision.
        """
        y = x @ w
        if "router" in p:
            logits = (x @ p["router"].astype(x.dtype)).astype(p["router"].dtype)
            routes = router.top_k(logits, self.top_k)
        elif self.decision in ctx:
            routes = ctx[self.decision]
        else:
            raise ValueError(
                f"Experts: no site before this one decided {self.decision!r}; expected one that "
                f"matches {self.router!r} in the same scope"
            )
        ids, weights = routes.ids, p["scale"] * routes.weights
        delta = dispatch.dispatch(x, p["a"], p["b"], ids, weights, self.backend)
        y = y + delta.astype(y.dtype)
        if "router" not in p:
            return y
        report = {"balance": routes.balance, "load": routes.load}
        return (y, report, {self.decision: routes}) if self.decision else (y, report)


SYSTEM = System(
    name="Experts",
    paper="Dou 2023, 2312.09979; Gao 2024, 2402.08562",
    symbol="Experts",
    evidence="equal back-ends, reports through aux",
    rows=(59,),
    missing="numbers of experts per layer; a claim",
    examples=(
        Experts(experts=3, top_k=2, rank=2),
        Experts(experts=3, top_k=2, rank=2, backend="gather"),
        Experts(experts=3, top_k=2, rank=2, backend="ragged"),
        Experts(experts=3, top_k=2, rank=2, decision="shared", router="up"),
    ),
    breaks={
        "L3": "the delta depends on the activation, so there is no merged weight",
    },
)
