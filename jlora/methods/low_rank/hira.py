"""HiRA: a low-rank matrix that multiplies the weight entrywise, a high-rank change of few numbers.

Symbols: A -> `a` [d_in, r]; B -> `b` [r, d_out].

.. math::
    W' = W + W \\odot (A B) = W \\odot (1 + A B)

Init: A uniform in ±1/sqrt(d_in), B = 0, hence the identity. There is no scale.

The delta has no factored form cheaper than itself (x (W ⊙ AB) is r matmuls with W), so there is no
fast path: a step forms W' and its gradient. Merge before serving.

Huang et al., `HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models
<https://openreview.net/forum?id=TwJrTz9cRS>`_, 2025.

Source: paper; shapes and init as PEFT 0.21.
Deviates: nothing.
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
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class HiRA(Method):
    """Entrywise multiplicative adapter of rank `rank`.

    Raises:
      ValueError: rank < 1.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    rank: int = 32

    def __post_init__(self) -> None:
        check_whole("HiRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_in, r], b [r, d_out] = 0."""
        bound, dtype = 1 / math.sqrt(site.d_in), site.param_dtype
        a = jax.random.uniform(key, (site.d_in, self.rank), dtype, -bound, bound)
        return {"a": a, "b": jnp.zeros((self.rank, site.d_out), dtype)}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """W * (1 + a b), [d_in, d_out]; exactly W while b is zero."""
        return w + w * (p["a"] @ p["b"])


SYSTEM = System(
    name="HiRA",
    paper="Huang 2025, ICLR",
    symbol="HiRA",
    evidence="outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    claim="hira",
    examples=(HiRA(rank=2),),
    breaks={
        "L4": "W * (1 + AB) has no factored form cheaper than itself",
    },
)
