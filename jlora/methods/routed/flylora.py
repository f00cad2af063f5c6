r"""FlyLoRA: a frozen sparse random projection that is the router too; merging is an average.

=============  ==========================================================================
x, y           activations [..., d_in], [..., d_out]
A              `a` [d_in, r], frozen; each column has p = d_in k / r nonzero entries
B              `b` [r, d_out], all that is trained
z              x A, the values of the ranks [..., r]
d              `bias` [r], balance state, frozen
k, alpha       active ranks per token; `scale` = alpha / r
=============  ==========================================================================

.. math::
    y = x W + \frac{\alpha}{r} (z \odot 1_I) B, \qquad z = x A, \quad
    I = \mathrm{top}_k(c(z, d)), \qquad A_{ij} \sim N(0, 1/r^2)

where c is one of the three selections of `jlora.routing.magnitudes`: "signed" (z + d, of the
official results), "magnitude" (|z| + d) and "biased magnitude" (|z + d|, as printed; its bias does
not balance). `bias` changes by `jlora.routing.state.advance` after a training step.

A is drawn from the key and the path of the site alone, so adapters that `jl.init` made with one key
share it. Their merge is then the mean of `b` (and of `bias`): at equal bias the merged adapter is
the mean of the adapters on every token. Without a common A the mean of the arrays is no merge.

Reported: `load` [r], `counts` [r], `dropped`, `balance` (0). ctx["mask"] leaves padding out.

Reference: Zou et al. 2025, `FlyLoRA <https://arxiv.org/abs/2510.08396>`_.
Deviates: gradients reach x through A (`through_a=False`: they do not, as in the official code); the
bias moves in training only; A is kept dense.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.routed.expert_bank import real_tokens
from jlora.routing import reports
from jlora.routing.magnitudes import Magnitudes, Select
from jlora.routing.router import dense_weights
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class FlyLoRA(Method):
    """`top_k` of `rank` ranks per token, chosen by their own values.

    Raises:
      ValueError: rank < 1, top_k not in 1..rank, an unknown selection, a rate below 0; at `init` a
        column of A without an entry.
    """

    rank: int = 32
    top_k: int = 8
    alpha: float = dataclasses.field(default=64.0, compare=False)
    select: Select = "signed"
    rate: float = 1e-3  # of the bias
    through_a: bool = True  # gradients reach x through A

    def __post_init__(self) -> None:
        check_whole("FlyLoRA.rank", self.rank)
        if not 1 <= self.top_k <= self.rank:
            raise ValueError(f"FlyLoRA.top_k: got {self.top_k}, expected 1..{self.rank}")
        Magnitudes(self.top_k, self.select, self.rate)

    @property
    def rule(self) -> Magnitudes:
        """How ranks are chosen; `jlora.routing.state.advance` looks for it."""
        return Magnitudes(self.top_k, self.select, self.rate)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """b [r, d_out] = 0; frozen a [d_in, r], scale [], bias [r]."""
        entries = site.d_in * self.top_k // self.rank
        if not entries:
            raise ValueError(
                f"FlyLoRA: {site.path}: got {site.d_in} inputs for {self.top_k} of {self.rank} "
                "ranks, expected at least one entry of A per rank"
            )
        kv, kp = jax.random.split(key)
        shape, dtype = (site.d_in, self.rank), site.param_dtype
        place = jnp.argsort(jnp.argsort(jax.random.uniform(kp, shape), axis=0), axis=0)
        value = jax.random.normal(kv, shape, dtype) / self.rank
        a = jnp.where(place < entries, value, jnp.zeros((), dtype))
        scale = jnp.asarray(self.alpha / self.rank, jnp.float32)
        frozen = {"a": a, "scale": scale, **self.rule.init_state(self.rank)}
        return {"b": jnp.zeros((self.rank, site.d_out), dtype)}, frozen

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], reports)."""
        y = x @ w
        z = x @ p["a"].astype(x.dtype)
        z = z if self.through_a else jax.lax.stop_gradient(z)
        values = z.astype(p["a"].dtype)
        mask = real_tokens(ctx, values)
        routes = self.rule.routes(values, {"bias": p["bias"]}, "key" in ctx, mask)
        active = dense_weights(routes.ids, routes.weights, self.rank)
        h = z * (p["scale"].astype(active.dtype) * active).astype(z.dtype)
        return y + (h @ p["b"].astype(z.dtype)).astype(y.dtype), reports.report(routes, mask)


SYSTEM = System(
    name="FlyLoRA",
    paper="Zou 2025, 2510.08396",
    symbol="FlyLoRA",
    evidence="numpy value of three selections; merge of eight is the mean on every token; A sparse",
    rows=(56,),
    claim="flylora",
    more_claims=("flylora_merge",),
    examples=(FlyLoRA(rank=4, top_k=2, alpha=3.0),),
    breaks={"L3": "which ranks are active depends on the activation: there is no merged weight"},
)
