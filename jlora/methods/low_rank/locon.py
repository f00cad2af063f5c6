"""LoCon with a core: a low-rank delta of a convolution whose window has a small kernel of its own.

Symbols: A -> `a` [channels, r]; t -> `t` [before, after, r, r], the kernel between the ranks, where
the window's places lie before or after the channels in d_in; B -> `b` [r, d_out];
s = alpha / rank -> `scale`.

.. math::
    \\Delta W_{(b c a), o} = s \\sum_k \\Big( \\sum_j t_{ba,jk} A_{cj} \\Big) B_{ko}

which is the convolution with 1 x 1 kernels A and B and the r x r kernel t between them, r (channels
+ r window + d_out) parameters where LoRA has r (channels window + d_out). It runs on the factors
A t [d_in, r] and B. On what is no convolution, or has a window of one place, it is LoRA.

Init: A uniform in ±1/sqrt(channels), t in ±1/sqrt(r window), B = 0, hence the identity.

Yeh et al., `LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2024 (Tucker decomposition of LoCon).

Source: paper; shapes, scale and init as LyCORIS 4.1 stores them (`lora_mid`).
Deviates: runs as one convolution with A t instead of three in a row.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.conv import tucker, window
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class LoCon(Method):
    """Low-rank adapter of a convolution with a core over its window; `scale` = alpha / rank.

    Raises:
      ValueError: rank < 1.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)

    def __post_init__(self) -> None:
        check_whole("LoCon.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [channels, r], t [before, after, r, r], b [r, d_out]; frozen scale []."""
        r, dtype, keys = self.rank, site.param_dtype, jax.random.split(key)
        before, channels, after = window(site)
        bound = 1 / math.sqrt(channels)
        a = jax.random.uniform(keys[0], (channels, r), dtype, -bound, bound)
        trainable = {"a": a, "b": jnp.zeros((r, site.d_out), dtype)}
        if before * after > 1:
            bound = 1 / math.sqrt(r * before * after)
            shape = (before, after, r, r)
            trainable["t"] = jax.random.uniform(keys[1], shape, dtype, -bound, bound)
        return trainable, {"scale": jnp.asarray(self.alpha / r, dtype)}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] and v [r, d_out], the scale in v."""
        a = tucker(p["a"], p["t"]).reshape(-1, p["b"].shape[0]) if "t" in p else p["a"]
        return a, p["scale"] * p["b"]


SYSTEM = System(
    name="LoCon",
    paper="Yeh 2024, 2309.14859",
    symbol="LoCon",
    evidence="LyCORIS's deltas and outputs to 1e-5, its files back bitwise",
    examples=(LoCon(rank=2, alpha=3.0),),
)
