"""KaSA: the noise of the weight is cut off, and a delta in the form of an SVD is trained.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out], of rank k at most
A, d, B            `a` [d_in, r], `d` [r], `b` [r, d_out], trained
A0, B0             `a0` [d_in, r], `b0` [r, d_out], frozen: the r smallest directions of W
s                  `scale`: alpha / r
=================  ===========================================================

.. math::
    W = \\sum_{i \\le k} \\sigma_i u_i v_i^T, \\qquad
    A_0 B_0 = \\sum_{i > k - r} \\sigma_i u_i v_i^T, \\qquad
    W' = (W - A_0 B_0) + s \\, A \\, \\mathrm{diag}(d) \\, B

Init: A uniform in ±1/sqrt(d_in), d ~ N(0, 1), B = 0: a fresh adapter is W without its r smallest
directions, not W. The base weight is not touched: what the paper takes from it is in the frozen
leaves. The paper trains with two penalties, the square of d (times 1e-4) and how far A and B are
from orthonormal (times 1e-3).

Wang et al., `KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models
<https://arxiv.org/abs/2412.06071>`_, 2024.

Source: paper; scale and start as PEFT 0.21.
Deviates: k = min(d_in, d_out), as PEFT; the official code cuts at d_in - r, which cuts nothing
where d_in is the larger side. Frozen leaves instead of an edited base.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


def smallest(w: Float[Array, "d_in d_out"], rank: int) -> tuple[jax.Array, jax.Array]:
    """The part of a weight in its smallest singular directions, as a product.

    Args:
      w: the weight, of which one SVD is taken.
      rank: how many directions, less than min(d_in, d_out).

    Returns:
      a0 [d_in, rank], which holds the singular values, and b0 [rank, d_out].

    Raises:
      ValueError: a rank that leaves no direction of w.
    """
    kept = min(w.shape) - rank
    if kept < 1:
        raise ValueError(f"KaSA rank: got {rank}, expected less than {min(w.shape)}")
    u, s, vt = numerics.svd(w)
    return u[:, kept:] * s[None, kept:], vt[kept:]


@dataclasses.dataclass(frozen=True)
class KaSA(Method):
    """Knowledge-aware singular-value adapter.

    Raises:
      ValueError: rank < 1; at init, a rank that is not below min(d_in, d_out).
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "d": -1, "b": -2, "a0": -1, "b0": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=16.0, compare=False)

    def __post_init__(self) -> None:
        check_whole("KaSA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a, d, b = 0; frozen a0, b0 and scale []."""
        try:
            a0, b0 = smallest(context.weight(), self.rank)
        except ValueError as error:
            raise ValueError(f"{site.path}: {error}") from error
        bound, dtype, keys = 1 / math.sqrt(site.d_in), site.param_dtype, jax.random.split(key)
        trainable = {
            "a": jax.random.uniform(keys[0], (site.d_in, self.rank), dtype, -bound, bound),
            "d": jax.random.normal(keys[1], (self.rank,), dtype),
            "b": jnp.zeros((self.rank, site.d_out), dtype),
        }
        return trainable, {"a0": a0, "b0": b0, "scale": jnp.float32(self.alpha / self.rank)}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, 2 r] = [s a d, -a0], v [2 r, d_out] = [b; b0]."""
        u = jnp.concatenate([p["scale"] * p["a"] * p["d"][None, :], -p["a0"]], axis=1)
        return u, jnp.concatenate([p["b"], p["b0"]], axis=0)


SYSTEM = System(
    name="KaSA",
    paper="Wang 2024, 2412.06071",
    symbol="KaSA",
    evidence="the cut weight against numpy's SVD; outputs of torch PEFT to 1e-5",
    rows=(15,),
    tests=("tests/io/peft/types_test.py",),
    claim="kasa",
    missing="the control of its row: leaving out the largest directions was not worse in its claim",
    examples=(KaSA(rank=2, alpha=3.0),),
    breaks={"L2": "the smallest directions of the weight are cut off from the start"},
)
