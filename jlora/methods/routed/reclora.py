r"""RecLoRA: a set of adapters whose factors are mixed by a vector of the user.

=============  ==========================================================================
x, y           activations [..., d_in], [..., d_out] of one site
u              ctx["user"] [..., U]: what another model knows of the user of a row
A_k, B_k       `a` [K, d_in, r], `b` [K, r, d_out]: the set
V, v, H, h     `inner` [U, n], `inner_bias` [n], `head` [n, K], `head_bias` [K], of all sites
tau, s         `temperature`; `scale` = alpha / r
=============  ==========================================================================

.. math::
    w = \mathrm{softmax}\big((\mathrm{relu}(\mathrm{LN}(u) V + v) H + h) / \tau\big), \qquad
    y = x W + s \, x A_u B_u, \quad A_u = \sum_k w_k A_k, \; B_u = \sum_k w_k B_k

The factors are mixed apart, so that a user has one adapter of rank r with the cross terms
:math:`w_k w_l A_k B_l`; with `mix` = "deltas" it is :math:`\sum_k w_k A_k B_k`. `root` takes
:math:`\sqrt{w_k}` in place of the weights. Without `softmax` w is the raw output.

Users with few rows share the set with all others, and u comes from a model of the interactions of
everybody, which may have seen far more rows (few to many). u has the leading axes of x, or the
first ones of them: [rows, U] for x [rows, tokens, d_in].

`personal` gives the adapter of one user as plain LoRA, to be merged, saved or served.

Reported: `weights` [K], the mean over users.

Init: A_k uniform in ±1/sqrt(d_in), B_k = 0 (the identity); V, H uniform in ±1/sqrt(inputs), v = h =
0.

Reference: Zhu et al. 2024, `RecLoRA <https://arxiv.org/abs/2408.03533>`_.
Deviates: the layer norm has no gain and offset (V and v can take them over); no dropout in the
classifier; one classifier for all sites.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.routed.expert_bank import new_experts
from jlora.routing import dispatch
from jlora.system import System
from jlora.types import Dynamic

EPSILON = 1e-5  # of the layer norm, as in torch


@dataclasses.dataclass(frozen=True)
class RecLoRA(Method):
    """`experts` adapters of `rank`, mixed for users that are vectors of size `user`.

    Raises:
      ValueError: user, experts, rank or width < 1, a temperature that is not above 0, an unknown
        mix; at a call, no user, or one of another size or of other rows.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    user: int  # U
    experts: int = 8  # K
    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)
    width: int = 60  # n, of the classifier's inner layer
    temperature: float = 1.0
    softmax: bool = True
    mix: Literal["factors", "deltas"] = "factors"
    root: bool = False  # square roots of the weights

    def __post_init__(self) -> None:
        for name in ("user", "experts", "rank", "width"):
            check_whole(f"RecLoRA.{name}", getattr(self, name))
        if not self.temperature > 0:
            raise ValueError(f"RecLoRA.temperature: got {self.temperature}, expected above 0")
        if self.mix not in ("factors", "deltas"):
            raise ValueError(f"RecLoRA.mix: got {self.mix!r}, expected 'factors' or 'deltas'")
        if self.root and not self.softmax:
            raise ValueError("RecLoRA.root: got True without softmax, expected weights above 0")

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """inner [U, n], inner_bias [n], head [n, K], head_bias [K]."""
        kv, kh = jax.random.split(key)
        dtype, n = sites[0].param_dtype, self.width

        def uniform(key: PRNGKeyArray, rows: int, columns: int) -> Array:
            bound = 1 / math.sqrt(rows)
            return jax.random.uniform(key, (rows, columns), dtype, -bound, bound)

        return {
            "inner": uniform(kv, self.user, n), "inner_bias": jnp.zeros(n, dtype),
            "head": uniform(kh, n, self.experts), "head_bias": jnp.zeros(self.experts, dtype),
        }, {}  # fmt: skip

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [K, d_in, r], b [K, r, d_out] = 0; frozen scale []."""
        scale = jnp.asarray(self.alpha / self.rank, jnp.float32)
        return new_experts(key, site, self.experts, self.rank), {"scale": scale}

    def weights(self, user: Float[Array, "... U"], p: Arrays) -> Float[Array, "... K"]:
        """How much of each adapter of the set a user gets.

        Args:
          user: u.
          p: the arrays of a site with the shared ones, as `prepare` returns them.

        Returns:
          w; with `root` its square roots.
        """
        u = user.astype(p["inner"].dtype)
        mean = jnp.mean(u, axis=-1, keepdims=True)
        spread = jnp.mean((u - mean) ** 2, axis=-1, keepdims=True)
        u = (u - mean) * jax.lax.rsqrt(spread + EPSILON)
        z = jax.nn.relu(_plus(u @ p["inner"], p["inner_bias"]))
        z = _plus(z @ p["head"], p["head_bias"]) / self.temperature
        w = jax.nn.softmax(z, axis=-1) if self.softmax else z
        return jnp.sqrt(w) if self.root else w

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> ([..., d_out], {"weights": [K]})."""
        if "user" not in ctx:
            raise ValueError("RecLoRA: got no ctx['user'], expected the vectors of the users")
        user, lead = ctx["user"], x.shape[:-1]
        if user.shape[-1] != self.user or user.shape[:-1] != lead[: user.ndim - 1]:
            raise ValueError(f"RecLoRA: ctx['user']: got {user.shape}, expected the first axes of "
                             f"{lead} and {self.user}")  # fmt: skip
        y, own = x @ w, self.weights(user, p)
        more = (1,) * (len(lead) - user.ndim + 1)
        gates = own.reshape(*own.shape[:-1], *more, self.experts)
        delta = self._delta(x, gates, p)
        mean = jnp.mean(own, axis=tuple(range(own.ndim - 1)))
        return y + delta.astype(y.dtype), {"weights": mean}

    def _delta(self, x: Dynamic, gates: Array, p: Arrays) -> Array:
        a, b, gates, scale = (t.astype(x.dtype) for t in (p["a"], p["b"], gates, p["scale"]))
        if self.mix == "deltas":
            return dispatch.mixed(x, a, b, gates * scale)
        wide = x @ jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)  # x A_1, ..., x A_K
        h = wide.reshape(*wide.shape[:-1], self.experts, self.rank) * gates[..., None]
        h = jnp.sum(h, axis=-2, keepdims=True) * scale  # x A_u
        h = (h * gates[..., None]).reshape(*wide.shape[:-1], -1)
        return h @ b.reshape(-1, b.shape[-1])


def _plus(t: Array, bias: Float[Array, "n"]) -> Array:
    return t + bias.reshape((1,) * (t.ndim - 1) + (-1,))


def personal(adapter: Adapter, user: Float[Array, "U"]) -> Adapter:
    """The adapter of one user.

    Args:
      adapter: of `RecLoRA` at every site.
      user: u.

    Returns:
      An adapter of `LoRA` at the same sites: of rank r, and of rank K r with `mix` = "deltas".

    Raises:
      ValueError: a site of another method, or a user of another size.
    """
    trainable, frozen, sites = {}, {}, []
    for site, method in adapter.sites:
        if not isinstance(method, RecLoRA):
            raise ValueError(f"{site.path}: got {method}, expected RecLoRA")
        if user.shape != (method.user,):
            raise ValueError(f"user: got {user.shape}, expected ({method.user},)")
        own, shared = adapter.arrays(site)
        w, axis = method.weights(user, {**shared, **own}), len(site.stack)
        column = w.reshape(-1, 1, 1).astype(own["a"].dtype)
        a, b = own["a"] * _behind(column, axis), own["b"]
        if method.mix == "factors":
            a, b = a.sum(axis), (b * _behind(column, axis)).sum(axis)
        else:
            a = jnp.moveaxis(a, axis, -2)  # [*stack, d_in, K, r]
            a = a.reshape(*a.shape[:-2], -1)
            b = b.reshape(*b.shape[:axis], -1, b.shape[-1])
        trainable[site.path], frozen[site.path] = {"a": a, "b": b}, {"scale": own["scale"]}
        rank = a.shape[-1]
        lora = LoRA(rank, alpha=method.alpha / method.rank * rank)
        sites.append((dataclasses.replace(site, group=""), lora))
    return Adapter(trainable, frozen, tuple(sites))


def _behind(column: Float[Array, "K 1 1"], axes: int) -> Array:
    return column.reshape((1,) * axes + column.shape)


SYSTEM = System(
    name="RecLoRA",
    paper="Zhu 2024, 2408.03533",
    symbol="RecLoRA",
    evidence="numpy value of both mixes; one-hot weights are one adapter; a batch is its rows, and "
    "each row its personal LoRA",
    rows=(80,),
    claim="reclora",
    examples=(RecLoRA(user=3, experts=3, rank=2, width=4),),
    breaks={"L3": "the delta depends on the user, so there is no merged weight"},
)
