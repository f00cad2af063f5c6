"""LoHa: the Hadamard product of two low-rank matrices, of rank up to r^2.

Symbols: A1, A2 -> `a1`, `a2` [d_in, r]; B1, B2 -> `b1`, `b2` [r, d_out];
s = alpha / rank -> `scale`.

.. math::
    \\Delta W = s \\, (A_1 B_1) \\odot (A_2 B_2)
             = s \\, (A_1 \\bullet A_2) (B_1^T \\bullet B_2^T)^T

where :math:`\\bullet` is the row-wise Khatri-Rao product: row i of :math:`A_1 \\bullet A_2` holds
all r^2 products :math:`A_{1,ir} A_{2,is}`. The right-hand side is an ordinary low-rank delta, which
is how it runs: no [d_in, d_out] array is ever made.

Of a convolution with `tucker`, a1 and a2 are [channels, r] and have a core each, `t1`, `t2`
[before, after, r, r] over the window, :math:`A_{bca,k} = \\sum_j t_{ba,jk} a_{cj}`.

Init: A1, B1, B2 uniform in ±1/sqrt(fan-in), A2 = 0, hence the identity.

Hyeon-Woo, Ye-Bin and Oh, `FedPara <https://arxiv.org/abs/2108.06098>`_, 2022; Yeh et al.,
`LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2024.

Source: paper; shapes, scale and init as PEFT 0.21 stores them.
Deviates: runs on Khatri-Rao factors where both official codes multiply out the delta.
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
from jlora.core.conv import tucker, window
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class LoHa(Method):
    """Hadamard-product adapter; `rank` of each of the two products, `scale` = alpha / rank.

    Raises:
      ValueError: rank < 1.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a1": -1, "b1": -2, "a2": -1, "b2": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    tucker: bool = False  # a core over the window of a convolution; of others no difference

    def __post_init__(self) -> None:
        check_whole("LoHa.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a1, a2 [d_in, r], b1, b2 [r, d_out], or with cores t1, t2; frozen scale []."""
        r, dtype, keys = self.rank, site.param_dtype, jax.random.split(key, 3)
        before, channels, after = window(site)
        cored = self.tucker and before * after > 1
        rows = channels if cored else site.d_in

        def uniform(key: jax.Array, rows: int, cols: int, fan_in: int) -> jax.Array:
            bound = 1 / math.sqrt(fan_in)
            return jax.random.uniform(key, (rows, cols), dtype, -bound, bound)

        trainable = {
            "a1": uniform(keys[0], rows, r, rows),
            "b1": uniform(keys[1], r, site.d_out, r),
            "a2": jnp.zeros((rows, r), dtype),
            "b2": uniform(keys[2], r, site.d_out, r),
        }
        if cored:
            for n, name in enumerate(("t1", "t2"), 1):
                core = uniform(jax.random.fold_in(key, n), before * after * r, r, r)
                trainable[name] = core.reshape(before, after, r, r)
        return trainable, {"scale": jnp.asarray(self.alpha / r, dtype)}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r^2] and v [r^2, d_out], the scale in u."""
        a1, a2 = _rows(p, "a1", "t1"), _rows(p, "a2", "t2")
        u = a1[:, :, None] * a2[:, None, :]
        v = p["b1"][:, None, :] * p["b2"][None, :, :]
        return p["scale"] * u.reshape(u.shape[0], -1), v.reshape(-1, v.shape[-1])

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + s (A1 B1) * (A2 B2), [d_in, d_out]."""
        left, right = _rows(p, "a1", "t1") @ p["b1"], _rows(p, "a2", "t2") @ p["b2"]
        return w + p["scale"] * left * right


def _rows(p: Arrays, name: str, core: str) -> jax.Array:
    """A factor [d_in, r], put together where it has a core."""
    a = p[name]
    return tucker(a, p[core]).reshape(-1, a.shape[1]) if core in p else a


SYSTEM = System(
    name="LoHa",
    paper="Hyeon-Woo 2022, 2108.06098",
    symbol="LoHa",
    evidence="outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    claim="loha",
    examples=(LoHa(rank=2),),
)
