r"""X-LoRA: frozen adapters, mixed per token and layer by what the base model thought of the input.

=============  ==========================================================================
x, y           activations [..., d_in], [..., d_out] of one site
A_k, B_k, c_k  `a` [K, d_in, r], `b` [K, r, d_out], `scales` [K]: the adapters, frozen
h              ctx["hidden"] [..., H]: the last hidden states of a first pass
V, v           `inner` [H, n], `inner_bias` [n], shared by all sites; only with `width` n > 0
U, u           `head` [n or H, K], `head_bias` [K], one per site and layer
tau, gamma     `temperature`, `strength`
=============  ==========================================================================

.. math::
    \text{pass 1: } h = \text{stop}(f(W; \cdot)), \qquad
    s = \mathrm{softmax}\big((\mathrm{relu}(h V + v) U + u) / \tau\big), \qquad
    \text{pass 2: } y = x W + \gamma \sum_k s_k c_k \, x A_k B_k

The heads of all sites and layers together are the paper's one linear map from H to K L scalings:
here each site holds its own part, so a scaling cannot reach another layer. With `top_k` the others
are set to 0, and what stays is not renormalised. Without softmax s are the raw outputs.

`two_pass` runs both passes. A call without ctx["hidden"] is an error and no first pass.

Reported: `scalings` [K], their mean over tokens (over those of ctx["mask"]).

Init: V, U uniform in ±1/sqrt(inputs), v = u = 0; the adapters as `Experts`, until `with_experts` of
`jlora.methods.routed.expert_bank` puts others in.

Reference: Buehler and Buehler 2024, `X-LoRA <https://arxiv.org/abs/2402.07148>`_.
Deviates: with `top_k` the softmax is over the experts of one token (the official code takes it over
all kept entries of a batch); no dropout in the classifier.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.routed.expert_bank import new_experts, real_tokens
from jlora.routing import dispatch, reports
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class XLoRA(Method):
    """`experts` frozen adapters, scaled by a classifier of hidden states of size `hidden`.

    Raises:
      ValueError: rank, experts or hidden < 1; width < 0; top_k not in 0..experts; a temperature
        that is not above 0; at a call, no hidden states, or of another size.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    experts: int
    hidden: int  # H
    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    width: int = 0  # of the classifier's inner layer; 0: none
    softmax: bool = True
    temperature: float = 1.0
    top_k: int = 0  # adapters per token; 0: all
    strength: float = 1.0
    train_experts: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "experts", "hidden"):
            check_whole(f"XLoRA.{name}", getattr(self, name))
        if self.width < 0:
            raise ValueError(f"XLoRA.width: got {self.width}, expected 0 or more")
        if not 0 <= self.top_k <= self.experts:
            raise ValueError(f"XLoRA.top_k: got {self.top_k}, expected 0..{self.experts}")
        if not self.temperature > 0:
            raise ValueError(f"XLoRA.temperature: got {self.temperature}, expected above 0")

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """inner [H, n], inner_bias [n] of a classifier with an inner layer."""
        if not self.width:
            return {}, {}
        dtype, bound = sites[0].param_dtype, 1 / math.sqrt(self.hidden)
        inner = jax.random.uniform(key, (self.hidden, self.width), dtype, -bound, bound)
        return {"inner": inner, "inner_bias": jnp.zeros(self.width, dtype)}, {}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """head [n, K], head_bias [K]; a, b; frozen scales [K]."""
        ka, kh = jax.random.split(key)
        inputs, dtype = self.width or self.hidden, site.param_dtype
        bound = 1 / math.sqrt(inputs)
        trainable = {
            "head": jax.random.uniform(kh, (inputs, self.experts), dtype, -bound, bound),
            "head_bias": jnp.zeros(self.experts, dtype),
        }
        frozen = {"scales": jnp.full(self.experts, self.alpha / self.rank, jnp.float32)}
        experts = new_experts(ka, site, self.experts, self.rank)
        (trainable if self.train_experts else frozen).update(experts)
        return trainable, frozen

    def scalings(self, hidden: Dynamic, p: Arrays) -> jax.Array:
        """How much of each adapter every token gets.

        Args:
          hidden: [..., H], of the first pass.
          p: the arrays of a site with the shared ones, as `prepare` returns them.

        Returns:
          [..., K].
        """
        h = jax.lax.stop_gradient(hidden).astype(p["head"].dtype)
        if self.width:
            h = h @ p["inner"]
            h = jax.nn.relu(h + p["inner_bias"].reshape((1,) * (h.ndim - 1) + (-1,)))
        s = h @ p["head"]
        s = (s + p["head_bias"].reshape((1,) * (s.ndim - 1) + (-1,))) / self.temperature
        s = jax.nn.softmax(s, axis=-1) if self.softmax else s
        if self.top_k:
            _, ids = jax.lax.top_k(jax.lax.stop_gradient(s), self.top_k)
            s = s * jnp.sum(jax.nn.one_hot(ids, self.experts, dtype=s.dtype), axis=-2)
        return s

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], {"scalings": [K]})."""
        if "hidden" not in ctx:
            raise ValueError(
                "XLoRA: got no ctx['hidden'], expected the hidden states of a first pass, as "
                "`two_pass` gives them"
            )
        if ctx["hidden"].shape[-1] != self.hidden:
            raise ValueError(
                f"XLoRA: ctx['hidden']: got {ctx['hidden'].shape}, expected [..., {self.hidden}]"
            )
        y, s = x @ w, self.scalings(ctx["hidden"], p)
        gates = s * (self.strength * p["scales"]).astype(s.dtype).reshape(
            (1,) * (s.ndim - 1) + (-1,)
        )
        delta = dispatch.mixed(x, p["a"], p["b"], gates)
        mask = real_tokens(ctx, s)
        return y + delta.astype(y.dtype), {"scalings": reports.mean(s, mask)}


def two_pass(hidden: Callable, fn: Callable, *, aux: bool = False) -> Callable:
    """A model whose adapters are mixed by what the base model's first pass gives.

    Args:
      hidden: (params, *args) -> [..., H], the last hidden states of the base.
      fn: (params, *args) -> output, the model.
      aux: also return what methods report, as `jl.lift` does.

    Returns:
      A function of (params, adapter, *args, ctx=None).
    """
    tuned = lift(fn, aux=aux)

    def run(params: Dynamic, adapter: Dynamic, *args: Dynamic, ctx: Dynamic = None) -> Dynamic:
        states = jax.lax.stop_gradient(hidden(params, *args))
        return tuned(params, adapter, *args, ctx={**(ctx or {}), "hidden": states})

    return run


SYSTEM = System(
    name="XLoRA",
    paper="Buehler 2024, 2402.07148",
    symbol="XLoRA",
    evidence="numpy value; one-hot scalings are one adapter; gradients in the classifier alone",
    rows=(60,),
    claim="xlora",
    examples=(XLoRA(experts=3, hidden=6, rank=2, width=4, top_k=2, train_experts=True),),
    breaks={"L3": "the delta depends on hidden states, so there is no merged weight"},
)
