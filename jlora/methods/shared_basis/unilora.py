"""Uni-LoRA: one trained vector for the whole model; every entry of every factor is one of its own.

============  =======================================================================
theta         `theta` [d], trained, one for all sites of the pattern
i_A, i_B      `index_a` [d_in, r], `index_b` [r, d_out]: which entry stands where; fixed
n_j           how often entry j is used in all sites together
              `scale_a` [d_in, r], `scale_b` [r, d_out]: n_j^(-1/2) where j stands
============  =======================================================================

.. math::
    A = \\theta[i_A] \\odot n_{i_A}^{-1/2}, \\quad B = \\theta[i_B] \\odot n_{i_B}^{-1/2}, \\qquad
    \\Delta W = A B

The map from theta to all factors, flattened, is an isometry P: every row of P has one entry, and
:math:`P^T P = I`. Over the D entries of all sites the assignment is balanced, n_j is D / d rounded
up or down.

Init: theta uniform in ± `bound`. A fresh adapter is close to the identity, but not equal to it.

Reference: Li et al. 2025, `Uni-LoRA <https://arxiv.org/abs/2506.00799>`_; balanced assignment and
initial values as PEFT 0.21.
Deviates: each site shuffles its own part of the assignment (PEFT shuffles all of it at once).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class UniLoRA(Method):
    """Low-rank factors made of one vector; it is one group for all sites of the pattern.

    Raises:
      ValueError: rank or size below 1; at init, where all sites together have fewer than `size`
        entries, so that some would not be used.
    """

    rank: int = 4
    size: int = 256  # of theta, d
    bound: float = dataclasses.field(default=0.02, compare=False)

    def __post_init__(self) -> None:
        check_whole("UniLoRA.rank", self.rank)
        check_whole("UniLoRA.size", self.size)

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Trainable theta [d], in the widest dtype of the sites."""
        total = sum(self._entries(s) * math.prod(s.stack) for s in sites)
        if not self.size <= total < 2**31:
            raise ValueError(f"UniLoRA.size: got {self.size} for {total} entries of all sites, "
                             "expected size <= entries < 2^31")  # fmt: skip
        dtype = max((s.param_dtype for s in sites), key=lambda d: jnp.dtype(d).itemsize)
        return {"theta": jax.random.uniform(key, (self.size,), dtype, -self.bound, self.bound)}, {}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """Nothing trainable; frozen index_a, scale_a [d_in, r], index_b, scale_b [r, d_out]."""
        before = [s for s in context.siblings if s.path < site.path]
        start = sum(self._entries(s) * math.prod(s.stack) for s in before)
        total = sum(self._entries(s) * math.prod(s.stack) for s in context.siblings)
        count = self._entries(site)
        # positions start, start + 1, ... of this slice among all D, shuffled; entry = position % d
        first = (jnp.int32(start % self.size) + context.index * jnp.int32(count)) % self.size
        index = (first + jax.random.permutation(key, count).astype(jnp.int32)) % self.size
        uses = total // self.size + (index < total % self.size).astype(jnp.int32)
        scale = jax.lax.rsqrt(uses.astype(site.param_dtype))
        shapes = {"a": (site.d_in, self.rank), "b": (self.rank, site.d_out)}
        cut, frozen = site.d_in * self.rank, {}
        for (name, shape), part in zip(shapes.items(), (slice(cut), slice(cut, None)), strict=True):
            frozen[f"index_{name}"] = index[part].reshape(shape)
            frozen[f"scale_{name}"] = scale[part].reshape(shape)
        return {}, frozen

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] and v [r, d_out], entries of theta times their scales."""
        u, v = (p["theta"].at[p[f"index_{k}"]].get(mode="promise_in_bounds") for k in "ab")
        return u * p["scale_a"], v * p["scale_b"]

    def _entries(self, site: Site) -> int:
        """How many entries the factors of one slice have."""
        return self.rank * (site.d_in + site.d_out)


SYSTEM = System(
    name="UniLoRA",
    paper="Li 2025, 2506.00799",
    symbol="UniLoRA",
    evidence="an isometry to rounding; theta's gradient against NumPy over two sites; outputs of "
    "torch PEFT to 1e-5, its files with indices back bitwise",
    tests=("tests/io/peft/shared_vectors_test.py",),
    rows=(12,),
    claim="unilora",
    examples=(UniLoRA(rank=2, size=24),),
    breaks={"L2": "a vector of zeros could not learn, so the paper starts near the identity"},
)
