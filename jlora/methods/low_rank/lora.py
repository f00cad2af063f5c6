"""Low-rank adaptation: a trained product of two thin matrices alongside a frozen weight.

=========  ===========================================================
x, y       activations [..., d_in], [..., d_out]
W          `w`, frozen, [d_in, d_out]
A, B       `a` [d_in, r], `b` [r, d_out]
s          `scale`: alpha / r, or alpha / sqrt(r) with `rslora`
D          dropout of rate `dropout`, where the context has a `key`
=========  ===========================================================

.. math:: y = x W + s\\, D(x) A B, \\qquad W' = W + s A B

A ~ N(0, 1/r) where a table is looked up, else uniform in :math:`\\pm 1/\\sqrt{d_{in}}`; B = 0.

Paper: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; frozen A:
LoRA-FA, Zhang et al. 2023, arXiv:2308.03303.
Source: paper; the bound of A is that of the official code (Kaiming, a = sqrt 5).
Deviates: a table's A is drawn normal and B is zero (the official code: A zero, B normal).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


def dropout(x: Dynamic, rate: float, key: PRNGKeyArray) -> Dynamic:
    """Zeroes entries at random and scales up the others.

    Args:
      x: [...], or what stands for it.
      rate: probability of a zero, in [0, 1).
      key: of the mask.

    Returns:
      As x; the others are multiplied by 1 / (1 - rate).
    """

    def mask(t):
        keep = jax.random.bernoulli(key, 1.0 - rate, t.shape)
        return jnp.where(keep, t / jnp.asarray(1.0 - rate, t.dtype), jnp.zeros((), t.dtype))

    return x.map(mask) if hasattr(x, "map") else mask(x)


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Hyper-parameters of a low-rank adapter.

    Trainable `a` [d_in, r], `b` [r, d_out]; frozen `scale` []. With `freeze_a`, `a` is frozen too.
    Raises ValueError for a rank < 1 or a dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    rslora: bool = dataclasses.field(default=False, compare=False)  # scale by 1 / sqrt(rank)
    freeze_a: bool = False
    dropout: float = 0.0  # applied only where ctx has a `key`

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    def __post_init__(self):
        check_whole("LoRA.rank", self.rank)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected 0 <= dropout < 1")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        shape, dtype = (site.d_in, self.rank), site.param_dtype
        if "gather" in site.ops:
            a = jax.random.normal(key, shape, dtype) / math.sqrt(self.rank)
        else:
            bound = 1.0 / math.sqrt(site.d_in)
            a = jax.random.uniform(key, shape, dtype, -bound, bound)
        b = jnp.zeros((self.rank, site.d_out), dtype)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        frozen = {"scale": jnp.asarray(scale, jnp.float32)}
        if self.freeze_a:
            return {"b": b}, {"a": a, **frozen}
        return {"a": a, "b": b}, frozen

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        return p["a"], p["b"] * p["scale"].astype(p["b"].dtype)

    def of_factors(self, u: Float[Array, "d_in r"], v: Float[Array, "r d_out"]) -> Arrays:
        return {"a": u, "b": v, "scale": jnp.ones((), jnp.float32)}

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> jax.Array:
        y = x @ w
        if self.dropout and "key" in ctx:
            x = dropout(x, self.dropout, ctx["key"])
        return y + low_rank(x, *self.factors(p)).astype(y.dtype)


SYSTEM = System(
    name="LoRA",
    paper="Hu 2021, 2106.09685",
    symbol="LoRA",
    evidence="outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    examples=(
        LoRA(rank=2, alpha=3.0),
        LoRA(rank=2, rslora=True, freeze_a=True),
    ),
)
