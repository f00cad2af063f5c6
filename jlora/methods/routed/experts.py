"""Routed LoRA experts: every token picks k of E low-rank deltas and mixes them.

Symbols: A_e, B_e -> `a` [E, d_in, r], `b` [E, r, d_out]; router R -> `router` [d_in, E];
s = alpha / rank -> `scale`; k -> `top_k`.

.. math::
    y = x W + s \\sum_{e \\in I(x)} g_e(x) \\; x A_e B_e, \\qquad
    g(x) = \\mathrm{softmax}_{I(x)}(x R), \\quad I(x) = \\mathrm{top}_k(x R)

With `rule` another rule of `jlora.routing` chooses (`TopP`, `Capacity`, `BiasBalanced`, ...);
`jlora.routing.state.advance` moves what it remembers. With `counts` the layers of a stack have
different numbers of experts, the first N_l of E, in one scan (MoLA); experts that are not there are
zero and are never chosen.

With `decision` the sites of a block share one router: the first of them, which `router` matches,
decides and publishes g, and the later ones of the same scope read it. The delta depends on x, so
there is no merged weight. Reported through `aux`: `balance`, the scalar
of `routing.router` to be added to the loss with a small weight (per layer 1 where its own experts
are even), `load` [E], `counts` [E] and `dropped`, the share of choices of weight 0. ctx["mask"]
leaves padding out of them.

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
from jlora.methods.routed.expert_bank import real_tokens
from jlora.routing import dispatch, reports, router
from jlora.routing.expert_counts import within
from jlora.routing.rule import Rule
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Experts(Method):
    """`experts` LoRA experts of rank `rank`, `top_k` a token; back-ends in `routing.dispatch`.

    Raises:
      ValueError: rank < 1, top_k not in 1..experts, an unknown back-end; counts that are not in
        top_k..experts, or with a rule that has a state; at `init`, not one count per layer.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    experts: int = 8
    top_k: int = 2
    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    backend: str = "dense"
    decision: str = ""  # name under which sites of one scope share a router; "": each has its own
    router: str = ""  # with `decision`: regex on paths, the sites that have a router
    counts: tuple[int, ...] = ()  # experts of each layer of the stack; (): all have `experts`
    rule: Rule | None = None  # None: `top_k`, which another rule does not read

    def __post_init__(self) -> None:
        check_whole("Experts.rank", self.rank)
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"Experts.top_k: expected in 1..{self.experts}, got {self.top_k}")
        if self.backend not in dispatch.BACKENDS:
            raise ValueError(
                f"Experts.backend: expected one of {dispatch.BACKENDS}, got {self.backend!r}"
            )
        if any(not self.top_k <= n <= self.experts for n in self.counts):
            raise ValueError(
                f"Experts.counts: got {self.counts}, expected in {self.top_k}..{self.experts}"
            )
        if self.counts and self.rule is not None and self.rule.state_names:
            raise ValueError(f"Experts.rule: got {self.rule} with counts, expected no state")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """router [d_in, E], a [E, d_in, r], b [E, r, d_out] = 0; frozen scale [], count [] int32
        with `counts`, and the state of the rule."""
        ka, kr = jax.random.split(key)
        e, r, dtype, bound = self.experts, self.rank, site.param_dtype, 1 / math.sqrt(site.d_in)
        trainable = {
            "a": jax.random.uniform(ka, (e, site.d_in, r), dtype, -bound, bound),
            "b": jnp.zeros((e, r, site.d_out), dtype),
        }
        if not self.decision or re.search(self.router, site.path):
            trainable["router"] = 0.02 * jax.random.normal(kr, (site.d_in, e), dtype)
        frozen = {"scale": jnp.asarray(self.alpha / r, dtype)}
        if self.counts:
            frozen["count"] = self._count(site, context)
            there = jnp.arange(e, dtype=jnp.int32) < frozen["count"]
            trainable["a"] = jnp.where(there[:, None, None], trainable["a"], jnp.zeros((), dtype))
        if self.rule is not None and "router" in trainable:
            frozen |= self.rule.init_state(e)
        return trainable, frozen

    def _count(self, site: Site, context: InitContext) -> jax.Array:
        stack = next(s.stack for s in context.siblings if s.path == site.path)
        if math.prod(stack) != len(self.counts):
            raise ValueError(
                f"Experts.counts: {site.path}: got {len(self.counts)} numbers, expected one per "
                f"layer of the stack {stack}"
            )
        return jnp.asarray(self.counts, jnp.int32)[context.index]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], {"balance": [], "load": [E]}); shared: published, read.

        Raises:
          ValueError: no site before this one in its scope made the decision.
        """
        y, mask = x @ w, None
        if "router" in p:
            logits = (x @ p["router"].astype(x.dtype)).astype(p["router"].dtype)
            mask, train = real_tokens(ctx, logits), "key" in ctx
            rule = router.TopK(self.top_k) if self.rule is None else self.rule
            state = {name: p[name] for name in rule.state_names}
            if self.counts:
                routes = within(rule, logits, p["count"], state, train, mask)
            else:
                routes = rule.routes(logits, state, train, mask)
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
        report = reports.report(routes, mask)
        return (y, report, {self.decision: routes}) if self.decision else (y, report)


SYSTEM = System(
    name="Experts",
    paper="Dou 2023, 2312.09979; Gao 2024, 2402.08562",
    symbol="Experts",
    evidence="equal back-ends; reports through aux; fewer experts in some layers, padded == ragged",
    rows=(59,),
    claim="mola",
    examples=(
        Experts(experts=3, top_k=2, rank=2),
        Experts(experts=3, top_k=2, rank=2, backend="gather"),
        Experts(experts=3, top_k=2, rank=2, backend="ragged"),
        Experts(experts=3, top_k=2, rank=2, decision="shared", router="up"),
        Experts(experts=3, top_k=2, rank=2, counts=(2, 3)),
    ),
    breaks={
        "L3": "the delta depends on the activation, so there is no merged weight",
    },
)
