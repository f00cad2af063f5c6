"""DoRA: a learned length for every column of the weight, and LoRA for its direction.

Symbols: A -> `a` [d_in, r]; B -> `b` [r, d_out]; m -> `m` [d_out]; s = alpha / rank -> `scale`.

.. math::
    W' = V \\, \\mathrm{diag}(m / \\|V\\|_c), \\qquad V = W + s A B

with :math:`\\|V\\|_c` the norms of the columns (one an output feature), taken as constants by the
gradient (section 4.3 of the paper). V is never formed; its norms are

.. math::
    \\|V\\|_c^2 = \\|W\\|_c^2 + 2 s \\, 1^T (A^T W \\odot B) + s^2 \\, 1^T (A^T A B \\odot B)

which costs 2 r d_in d_out a step beside the 2 T d_in d_out of the matmul, and no memory.
Init: A uniform in ±1/sqrt(d_in), B = 0, m = the norms of W, hence the identity. A column of zeros
stays zero until V has one that is not.

Liu et al., `DoRA: Weight-Decomposed Low-Rank Adaptation <https://arxiv.org/abs/2402.09353>`_, 2024.

Source: paper; detached norm, init and the bias left outside as PEFT 0.21.
Deviates: closed-form norms (PEFT forms V in every step). The norm is detached in `merge` too, so
that gradients through the definition are the paper's.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.adapter import Arrays, Method, Site, low_rank
from jlora.core.checks import check_whole
from jlora.system import System


def column_norms(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """The norms [d_out] of the columns of w + scale a b, without forming it; in the dtype of a."""
    w, b = w.astype(a.dtype), scale * b
    square = jnp.sum(w * w, axis=0)
    square = square + jnp.sum((2 * (a.T @ w) + (a.T @ a) @ b) * b, axis=0)
    return jnp.sqrt(jnp.maximum(square, 0))  # rounding can leave -eps where V vanishes


@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """Weight-decomposed LoRA.

    Raises:
      ValueError: rank < 1.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    rslora: bool = dataclasses.field(default=False, compare=False)  # s = alpha / sqrt(rank)

    def __post_init__(self) -> None:
        check_whole("DoRA.rank", self.rank)

    def init(self, key: jax.Array, site: Site) -> tuple[Arrays, Arrays]:
        """a [d_in, r], b [r, d_out] = 0, m [d_out] = the column norms of W; frozen scale []."""
        w, bound = site.weight(), 1 / math.sqrt(site.d_in)
        a = jax.random.uniform(key, (site.d_in, self.rank), w.dtype, -bound, bound)
        b = jnp.zeros((self.rank, site.d_out), w.dtype)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        scale = jnp.asarray(scale, w.dtype)
        return {"a": a, "b": b, "m": column_norms(w, a, b, scale)}, {"scale": scale}

    def merge(self, w: jax.Array, p: Arrays) -> jax.Array:
        """(w + s a b) m / |w + s a b|, [d_in, d_out]."""
        v = w + p["scale"] * (p["a"] @ p["b"])
        norm = jnp.linalg.norm(jax.lax.stop_gradient(v), axis=0)
        return v * gain(p["m"], norm)[None, :]

    def apply(self, x: Any, w: Any, p: Arrays, ctx: Mapping[str, Any]) -> Any:
        """x [..., d_in] -> [..., d_out]."""
        y = x @ w
        y = y + low_rank(x, p["scale"] * p["a"], p["b"]).astype(y.dtype)
        fixed = jax.lax.stop_gradient((w.dense(), p["a"], p["b"], p["scale"]))
        by = gain(p["m"], column_norms(*fixed)).astype(y.dtype)
        return y * by.reshape(*[1] * (y.ndim - 1), -1)


def gain(m: jax.Array, norm: jax.Array) -> jax.Array:
    """m / norm, [d_out]; 1 for a column of zeros, which no gain can change."""
    live = norm > 0
    one = jnp.ones_like(norm)
    return jnp.where(live, m / jnp.where(live, norm, one), one)


SYSTEM = System(
    name="DoRA",
    paper="Liu 2024, 2402.09353",
    symbol="DoRA",
    evidence="gradient by hand, no dense V in the jaxpr; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    examples=(DoRA(rank=2),),
)
