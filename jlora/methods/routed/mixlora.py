r"""MixLoRA: experts of a whole feed-forward block, mixed behind its nonlinearity.

=============  ======================================================================
x              what the block is given, [..., d_in]
f              the function marked by `jl.block`, with weights W_1, ..., W_n
A_e, B_e, s    `expert_a` [E, d_in, r], `expert_b` [E, r, d_out], `expert_scale` [E]
R              `router` [d_in, E], at one site of the block
k              `top_k`, how many experts a token goes to
=============  ======================================================================

.. math::
    y = \sum_{e \in I(x)} g_e(x) \; f(W_1 + \Delta_e W_1, \dots, W_n + \Delta_e W_n; x),
    \qquad g(x) = \mathrm{softmax}_{I(x)}(x R), \quad I(x) = \mathrm{top}_k(x R)

Each expert is a method of its own (`method`, of which the paper takes LoRA). The router's decision
is made once per block and layer.

Two ways to the same sum. Every expert runs on every token, E bodies of f, and those that are not
chosen have weight zero: for any method and any f. With `sparse` a token meets its own experts
alone, k bodies: body j runs every token t through expert I(x_t)_j, whose low-rank part the
back-end of `routing.dispatch` looks up,

.. math::
    y_t = \sum_{j=1}^{k} g_{t,j} \; f(W_1 + \Delta_{e} W_1, \dots; x_t), \qquad e = I(x_t)_j

for experts of LoRA, and for a block that acts on each token by itself, as feed-forward blocks do;
its first matmul with a weight has the router.

Reported through `aux` under the name of the block: `balance`, to be added to the loss with a small
weight, and `load` [E].

Init: that of the method, hence the identity; R ~ N(0, 0.02^2).

Reference: Li et al. 2024, `MixLoRA <https://arxiv.org/abs/2404.15159>`_.
Deviates: tokens are not sorted by expert (the official code gathers the tokens of each); `sparse`
keeps them where they are and looks up factors. The base's part of the first layers is done once.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.block import BlockMethod
from jlora.core.method import Method, Wrapper
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.low_rank.lora import LoRA
from jlora.routing import dispatch, router
from jlora.system import System
from jlora.types import Dynamic

PREFIX = "expert_"  # of the names of arrays that have an axis of experts
SLOT = "choice"  # name of an array: which of a token's experts a body runs
BACKENDS = ("dense", "gather")  # of `routing.dispatch`; JAX cannot map "ragged" over choices


@dataclasses.dataclass(frozen=True)
class MixLoRA(BlockMethod):
    """`experts` copies of `method` at every site of the block, `top_k` of them per token.

    Raises:
      ValueError: top_k not in 1..experts; `sparse` with another method than LoRA without dropout,
        or with an unknown back-end.
    """

    experts: int = 8
    top_k: int = 2
    router: str = "gate"  # regex on paths: the site that has the router; x is what the block gets
    sparse: bool = False  # only a token's own experts run; the block must act token by token
    backend: str = "dense"  # with `sparse`: one of BACKENDS, of the low-rank parts

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"MixLoRA.top_k: got {self.top_k}, expected 1..{self.experts}")
        if self.backend not in BACKENDS:
            raise ValueError(f"MixLoRA.backend: got {self.backend!r}, expected one of {BACKENDS}")
        plain = type(self.method) is LoRA and not self.method.dropout
        if self.sparse and not plain:
            raise ValueError(
                f"MixLoRA.sparse: got experts of {self.method}, expected LoRA without dropout"
            )

    @property
    def rank_axes(self) -> Mapping[str, int]:  # type: ignore[override]
        return {PREFIX + name: axis for name, axis in self.method.rank_axes.items()}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """The method's arrays for each expert, [E, ...]; at one site router [d_in, E]."""
        key, of_router = jax.random.split(key)
        one = lambda key: self.method.init(key, site, context)  # noqa: E731
        parts = jax.vmap(one)(jax.random.split(key, self.experts))
        trainable, frozen = ({PREFIX + k: t for k, t in part.items()} for part in parts)
        if re.search(self.router, site.path):
            shape = (site.d_in, self.experts)
            trainable["router"] = 0.02 * jax.random.normal(of_router, shape, site.param_dtype)
        return trainable, frozen

    def experts_of(self, p: Arrays) -> tuple[Arrays, Arrays]:
        """The arrays of experts by the names of the method, and the router.

        Args:
          p: the arrays of one site, as `prepare` returns them.

        Returns:
          The arrays with a leading axis of experts, by the method's names, and the others. With
          `sparse` the bodies are not experts but choices: the number of the choice, [top_k], and
          all others.
        """
        experts = {k[len(PREFIX) :]: t for k, t in p.items() if k.startswith(PREFIX)}
        common = {k: t for k, t in p.items() if not k.startswith(PREFIX)}
        if not self.sparse:
            return experts, common
        stack = experts["scale"].shape[:-1]
        slots = jnp.arange(self.top_k, dtype=jnp.int32)
        return {SLOT: jnp.broadcast_to(slots, (*stack, self.top_k))}, {**experts, **common}

    def expert(self, p: Arrays) -> Method:
        """The method that each expert runs at this site.

        Args:
          p: the arrays of one site.

        Returns:
          The method; at the site of the router, one that also publishes where each token goes.
        """
        if self.sparse:
            return Chosen(self.method, self.block, self.top_k, self.backend)
        return Routed(self.method, self.block, self.top_k) if "router" in p else self.method

    def mix(self, y: Float[Array, "E ..."], ctx: Mapping[str, Dynamic]) -> tuple[jax.Array, Arrays]:
        """The sum of the experts' outputs, weighted by what the router published.

        Args:
          y: outputs of the block by expert (`sparse`: by choice), [E, ..., n], with the router's
            tokens as leading axes.
          ctx: holds the routes under the name of the block.

        Returns:
          [..., n], and the reports {"balance": [], "load": [E]}.

        Raises:
          ValueError: no site of the block has the router, or it saw other tokens.
        """
        if self.block not in ctx:
            raise ValueError(f"MixLoRA: no site of block {self.block!r} matches {self.router!r}")
        routes = ctx[self.block]
        gates = routes.weights
        if not self.sparse:
            gates = router.dense_weights(routes.ids, gates, self.experts)
        tokens = gates.shape[:-1]
        if y.shape[1 : 1 + len(tokens)] != tokens:
            raise ValueError(f"MixLoRA: the router saw tokens {tokens}, got outputs {y.shape[1:]}")
        gates = jnp.moveaxis(gates, -1, 0)
        gates = gates.reshape(gates.shape + (1,) * (y.ndim - gates.ndim))
        return jnp.sum(gates * y.astype(gates.dtype), 0), {
            "balance": routes.balance,
            "load": routes.load,
        }


@dataclasses.dataclass(frozen=True)
class Routed(Wrapper):
    """`method`, publishing as `name` where `router` sends each token."""

    name: str
    top_k: int

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], reports of the method, {name: routes})."""
        out = self.method.apply(x, w, p, ctx)
        y, *reports = out if isinstance(out, tuple) else (out,)
        return y, (reports or [{}])[0], {self.name: _decide(x, p, self.top_k)}


@dataclasses.dataclass(frozen=True)
class Chosen(Wrapper):
    """One LoRA expert per token: number `p[SLOT]` of those that `router` chose as `name`."""

    name: str
    top_k: int
    backend: str

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], no reports, {name: routes} where the router is).

        Raises:
          ValueError: no site before this one has the router, or x has other tokens than it saw.
        """
        decides = "router" in p
        if not decides and self.name not in ctx:
            raise ValueError(
                f"MixLoRA.sparse: no site of block {self.name!r} decided before this one; expected "
                "the router at the first weight that the block meets"
            )
        routes = _decide(x, p, self.top_k) if decides else ctx[self.name]
        if x.shape[:-1] != routes.ids.shape[:-1]:
            raise ValueError(
                f"MixLoRA: the router saw tokens {routes.ids.shape[:-1]}, got {x.shape[:-1]}"
            )
        ids = jax.lax.dynamic_index_in_dim(routes.ids, p[SLOT], -1)  # [..., 1]
        weights = p["scale"][ids]
        delta = dispatch.dispatch(x, p["a"], p["b"], ids, weights, self.backend)
        y = x @ w
        return y + delta.astype(y.dtype), {}, {self.name: routes} if decides else {}


def _decide(x: Dynamic, p: Arrays, k: int) -> router.Routes:
    logits = (x @ p["router"].astype(x.dtype)).astype(p["router"].dtype)
    return router.top_k(logits, k)


SYSTEM = System(
    name="MixLoRA",
    paper="Li 2024, 2404.15159",
    symbol="MixLoRA",
    evidence="value and gradients against a loop over merged experts; FLOPs of both forms",
    rows=(58,),
    claim="mixlora",
    examples=(
        MixLoRA(LoRA(rank=2), experts=3, router="up"),
        MixLoRA(LoRA(rank=2), experts=3, router="up", sparse=True),
    ),
    breaks={"L3": "the delta depends on the activation, so there is no merged weight"},
)
