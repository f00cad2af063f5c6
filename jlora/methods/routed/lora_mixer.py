r"""LoRA-Mixer: experts on projections, trained by task label first, then mixed by a router.

=============  ==========================================================================
x, y           activations [..., d_in], [..., d_out] of a projection (attention, SSM)
A_e, B_e, s_e  `a` [E, d_in, r], `b` [E, r, d_out], `scales` [E]
R              `router` [d_in, E]
c              ctx["labels"] [...], int: the expert of each token; in the hard regime
=============  ==========================================================================

.. math::
    y = x W + \sum_e g_e(x) \, s_e \, x A_e B_e, \qquad
    g(x) = \begin{cases}
      1_c & \text{"hard": experts are trained, each on its own task} \\
      \mathrm{softmax}(x R) & \text{"soft": the router is trained, all experts mix} \\
      \mathrm{softmax}_{\mathrm{top}_k}(x R) & \text{"sparse": inference}
    \end{cases}

Reported in the soft and sparse regimes: `balance` = E sum_e p_e f_e with f the share of top-k
choices, `entropy` H of softmax(x R), `load`, `counts`, `dropped`: what `specialisation` of
`jlora.routing.losses` makes its loss of, with the sign of the entropy as an argument. In the hard
regime `load`, `counts`. ctx["mask"] leaves padding out of them.

The regime is part of the method: `in_regime` gives an adapter another one. With
`train_experts=False` the experts are frozen (adapters from elsewhere, put in by `with_experts` of
`jlora.methods.routed.expert_bank`) and only R is trained; else `anchor` keeps them where they were.

Init: R ~ N(0, 0.02^2); experts as `Experts`.

Reference: Li et al. 2025, `LoRA-Mixer <https://arxiv.org/abs/2507.00029>`_.
Deviates: nothing that the paper says; there is no official code.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.routed.expert_bank import new_experts, real_tokens, token_labels
from jlora.routing import dispatch, labels, losses, reports
from jlora.routing.router import TopK, dense_weights
from jlora.system import System
from jlora.types import Dynamic, Tree

Regime = Literal["hard", "soft", "sparse"]


@dataclasses.dataclass(frozen=True)
class LoRAMixer(Method):
    """`experts` experts of rank `rank`, mixed as `regime` says.

    Raises:
      ValueError: rank < 1, top_k not in 1..experts, an unknown regime; at a call, the hard regime
        without labels of the tokens.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    experts: int = 5
    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    regime: Regime = "soft"
    top_k: int = 3  # of the sparse regime, and of the load that is balanced
    train_experts: bool = True

    def __post_init__(self) -> None:
        check_whole("LoRAMixer.rank", self.rank)
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"LoRAMixer.top_k: got {self.top_k}, expected 1..{self.experts}")
        if self.regime not in get_args(Regime):
            raise ValueError(
                f"LoRAMixer.regime: got {self.regime!r}, expected one of {get_args(Regime)}"
            )

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """router [d_in, E]; a, b (frozen without `train_experts`); frozen scales [E]."""
        ka, kr = jax.random.split(key)
        shape = (site.d_in, self.experts)
        trainable = {"router": 0.02 * jax.random.normal(kr, shape, site.param_dtype)}
        frozen = {"scales": jnp.full(self.experts, self.alpha / self.rank, jnp.float32)}
        experts = new_experts(ka, site, self.experts, self.rank)
        (trainable if self.train_experts else frozen).update(experts)
        return trainable, frozen

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], reports)."""
        y = x @ w
        logits = (x @ p["router"].astype(x.dtype)).astype(p["router"].dtype)
        mask = real_tokens(ctx, logits)
        if self.regime == "hard":
            which = token_labels(ctx, logits)
            if which is None:
                raise ValueError(
                    "LoRAMixer: the hard regime: got no ctx['labels'], expected the expert of each "
                    f"token, int {logits.shape[:-1]}"
                )
            routes = labels.hard(which, self.experts, mask)
            report = reports.report(routes, mask)
            gates = dense_weights(routes.ids, routes.weights, self.experts)
        else:
            routes = TopK(self.top_k).routes(logits, {}, "key" in ctx, mask)
            report = {**reports.report(routes, mask), "entropy": losses.entropy(logits, mask)}
            gates = dense_weights(routes.ids, routes.weights, self.experts)
            gates = jax.nn.softmax(logits, axis=-1) if self.regime == "soft" else gates
        scales = p["scales"].astype(gates.dtype).reshape((1,) * (gates.ndim - 1) + (-1,))
        delta = dispatch.mixed(x, p["a"], p["b"], gates * scales)
        return y + delta.astype(y.dtype), report


def in_regime(adapter: Adapter, regime: Regime) -> Adapter:
    """The same arrays in another regime.

    Args:
      adapter: any; methods other than LoRAMixer stay.
      regime: "hard", "soft" or "sparse".

    Returns:
      The adapter.
    """
    sites = tuple(
        (site, dataclasses.replace(m, regime=regime) if isinstance(m, LoRAMixer) else m)
        for site, m in adapter.sites
    )
    return adapter.replace(sites=sites)


def anchor(trainable: Tree, start: Tree) -> jax.Array:
    """How far experts have moved, as a sum of squares; routers move freely.

    Args:
      trainable: of an adapter, {path: {name: array}}.
      start: where it was when the router's training began.

    Returns:
      [], float32.
    """
    total = jnp.zeros((), jnp.float32)
    for path, arrays in trainable.items():
        for name in ("a", "b"):
            if name in arrays:
                moved = (arrays[name] - start[path][name]).astype(jnp.float32)
                total = total + jnp.sum(moved**2)
    return total


SYSTEM = System(
    name="LoRAMixer",
    paper="Li 2025, 2507.00029",
    symbol="LoRAMixer",
    evidence="numpy value of three regimes; router training leaves experts bit for bit; both signs",
    rows=(57,),
    claim="lora_mixer",
    examples=(LoRAMixer(experts=3, rank=2, top_k=2),),
    breaks={"L3": "the delta depends on the activation, so there is no merged weight"},
)
