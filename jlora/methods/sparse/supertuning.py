"""Super-Tuning: the largest entries of the weight are trained; with LoRA next to them it is Supra.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
c                   `c` [n], trained, n = floor((1 - sparsity) d_in d_out)
:math:`i_k, o_k`    `rows`, `cols` [n], int32, frozen: where abs(W) is largest at the start
A, B, s             `a` [d_in, r], `b` [r, d_out], trained, `scale` = alpha / r, with `rank` = r
==================  ===========================================================

.. math:: W' = W + \\sum_k c_k \\, e_{i_k} e_{o_k}^T \\quad (+\\; s \\, A B)

For a batch of tokens W with its changed entries is formed, since that takes fewer operations
(`jlora.methods.sparse.formed` counts them); for one token it is not.

Init: c = 0 and B = 0, hence the identity; A uniform in ±1/sqrt(d_in).

`Super-Tuning <https://arxiv.org/abs/2607.09287>`_, 2026.

Source: peft 0.21.2 and its documentation (the paper's text was not to be had).
Deviates: nothing that is known.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.sparse import formed
from jlora.methods.sparse.shira import scattered, sparse_product
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class SuperTuning(Method):
    """Sparse adapter of the entries that are largest, or with `largest` False smallest, in size.

    Raises:
      ValueError: a sparsity outside [0, 1), a rank < 0; at init, a sparsity that leaves no entry.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    sparsity: float = 0.99
    rank: int = 0  # of LoRA next to it, 0: none
    alpha: float = dataclasses.field(default=16.0, compare=False)
    largest: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"SuperTuning.sparsity: got {self.sparsity}, expected 0 <= it < 1")
        check_whole("SuperTuning.rank", self.rank, 0)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """c [n] = 0, and with `rank` a, b = 0; frozen rows, cols [n] int32, and scale []."""
        w = context.weight()
        count = int(w.size * (1 - self.sparsity))
        if count < 1:
            raise ValueError(
                f"{site.path}: SuperTuning sparsity: got {self.sparsity}, which leaves none of "
                f"{w.size} entries, expected at least one"
            )
        size = jnp.abs(w).T.reshape(-1)
        _, flat = jax.lax.top_k(size if self.largest else -size, count)
        rows, cols = flat % jnp.int32(site.d_in), flat // jnp.int32(site.d_in)
        trainable = {"c": jnp.zeros(count, w.dtype)}
        frozen = {"rows": rows, "cols": cols}
        if self.rank:
            bound = 1 / math.sqrt(site.d_in)
            shape = (site.d_in, self.rank)
            trainable["a"] = jax.random.uniform(key, shape, w.dtype, -bound, bound)
            trainable["b"] = jnp.zeros((self.rank, site.d_out), w.dtype)
            frozen["scale"] = jnp.asarray(self.alpha / self.rank, jnp.float32)
        return trainable, frozen

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w with c added at its places, and s a b."""
        if self.rank:
            w = w + p["scale"] * (p["a"] @ p["b"])
        return scattered(w, p["c"], p["rows"], p["cols"])

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        if formed.entries_are_cheaper(p["c"].size, formed.tokens(x), w.shape):
            y = x @ w
            y = y + sparse_product(x, p["c"], p["rows"], p["cols"], y.shape[-1]).astype(y.dtype)
        else:
            y = formed.times_formed(dataclasses.replace(self, rank=0), x, w, p)
        if self.rank:
            y = y + low_rank(x, p["a"], p["scale"] * p["b"]).astype(y.dtype)
        return y


SYSTEM = System(
    name="SuperTuning",
    paper="2026, 2607.09287",
    symbol="SuperTuning",
    evidence="the largest entries against numpy's sort; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the paper was not read",
    examples=(SuperTuning(sparsity=0.8, rank=2, alpha=3.0),),
    breaks={"L4": formed.WHY},
)
