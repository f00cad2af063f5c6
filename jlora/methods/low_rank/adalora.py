"""AdaLoRA's parameterisation: a low-rank delta in the form of a singular value decomposition.

=========  ===========================================================
W          `w`, frozen, [d_in, d_out]
A, B       `a` [d_in, r], `b` [r, d_out]
e          `e` [r], in the place of singular values
s          `scale`: alpha / (r + 1e-5), in float32 as PEFT computes it
=========  ===========================================================

.. math:: W' = W + s\\, A \\, \\mathrm{diag}(e) \\, B

One direction is switched off by one number, e_k = 0, and can come back; a penalty
(`jlora.penalties.orthogonality`) keeps A and B near orthogonal, so that e tells which directions
matter.

Init: A, B ~ N(0, 0.02^2) and e = 0, hence the identity.

Paper: Zhang et al. 2023, arXiv:2303.10512.
Source: paper; init, scale and its 1e-5 as PEFT 0.21.
Deviates: this is the parameterisation; who gets which rank is another matter.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System

STD, TINY = 0.02, 1e-5


def scale_of(alpha: float, rank: int) -> np.float32:
    """alpha / (rank + 1e-5), rounded where PEFT rounds.

    Args:
      alpha: as of the config.
      rank: r, the one to start with.

    Returns:
      The scale: in float64 it would round to another float32 for some ranks, 8 among them.
    """
    return np.float32(alpha) / (np.float32(rank) + np.float32(TINY))


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Hyper-parameters; `rank` is the one to start with.

    Trainable `a` [d_in, r], `e` [r], `b` [r, d_out]; frozen `scale` [].
    Raises ValueError for a rank < 1.
    """

    rank: int = 12
    alpha: float = dataclasses.field(default=8.0, compare=False)

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "e": -1, "b": -2}

    def __post_init__(self):
        check_whole("AdaLoRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        dtype, (first, second) = site.param_dtype, jax.random.split(key)
        a = STD * jax.random.normal(first, (site.d_in, self.rank), dtype)
        b = STD * jax.random.normal(second, (self.rank, site.d_out), dtype)
        scale = jnp.asarray(scale_of(self.alpha, self.rank))
        return {"a": a, "e": jnp.zeros(self.rank, dtype), "b": b}, {"scale": scale}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        e = p["e"] * p["scale"].astype(p["e"].dtype)
        return p["a"] * e[None, :], p["b"]


SYSTEM = System(
    name="AdaLoRA",
    paper="Zhang 2023, 2303.10512",
    symbol="AdaLoRA",
    evidence="one number switches a direction; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    claim="adalora",
    examples=(AdaLoRA(rank=2),),
)
