r"""TinyLoRA: between two frozen factors of a weight, a mix of random matrices, and one tiny vector.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]
A, B               `a` [d_in, r], `b` [r, d_out], frozen
:math:`P_i`        `p` [k, r, r], frozen, normal numbers of deviation :math:`r^{-1/2}`
v                  `v` [groups, k], trained, one for all sites of the pattern
g                  `group` [], int32, frozen: the row of v that the matrix uses
=================  ===========================================================

.. math::
    W' = W + A \Big( \sum_{i=1}^{k} v_{g i} P_i \Big) B, \qquad
    W = U \Sigma V^T, \quad A = U_r \Sigma_r^{1/2}, \quad B = \Sigma_r^{1/2} V_r^T

With `tying` = 1 all n matrices share one row, so that a model has k trained numbers; with 0 each
has a row of its own; between, there are :math:`\max(1, \mathrm{round}(n (1 - \text{tying})))` rows,
and matrices that follow each other share one. Here they are counted by the path of the site, then
by the layer. Init: v = 0, hence the identity.

Learning to Reason in 13 Parameters, `2602.04118 <https://arxiv.org/abs/2602.04118>`_, 2026.

Source: peft 0.21.2 and its documentation (the paper's text was not to be had).
Deviates: the P come from JAX's generator, by `seed` and the number of the matrix; those of PEFT
files are read as arrays. PEFT counts matrices in the order of torch's modules.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


def groups_of(count: int, tying: float) -> int:
    """How many vectors there are.

    Args:
      count: of the matrices, at least 1.
      tying: 0 (each its own) to 1 (one for all).

    Returns:
      At least 1.
    """
    return max(1, round(count * (1.0 - tying)))


def group_of(number: Dynamic, count: int, groups: int) -> Dynamic:
    """Which vector a matrix uses.

    Args:
      number: of the matrix, 0 to count - 1; an integer or an int32 array.
      count: of all matrices.
      groups: how many vectors there are.

    Returns:
      0 to groups - 1, of the kind of `number`.
    """
    size = max(1, count // groups)
    if isinstance(number, int):
        return min(number // size, groups - 1)
    return jnp.minimum(number // jnp.int32(size), jnp.int32(groups - 1))


@dataclasses.dataclass(frozen=True)
class TinyLoRA(Method):
    """Adapter of vectors of `size` numbers; it is one group for all sites of the pattern.

    Raises:
      ValueError: rank or size below 1, tying outside 0..1.
    """

    rank: int = 2  # of sites with fewer directions: as many as they have
    size: int = 64  # of a vector, k
    tying: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        check_whole("TinyLoRA.rank", self.rank)
        check_whole("TinyLoRA.size", self.size)
        if not 0.0 <= self.tying <= 1.0:
            raise ValueError(f"TinyLoRA.tying: got {self.tying}, expected 0 <= it <= 1")

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Trainable v [groups, k] = 0, in the widest dtype of the sites."""
        groups = groups_of(sum(math.prod(s.stack) for s in sites), self.tying)
        dtype = max((s.param_dtype for s in sites), key=lambda d: jnp.dtype(d).itemsize)
        return {"v": jnp.zeros((groups, self.size), dtype)}, {}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """Nothing trainable; frozen a [d_in, r], b [r, d_out], p [k, r, r], group []."""
        before = sum(math.prod(s.stack) for s in context.siblings if s.path < site.path)
        count = sum(math.prod(s.stack) for s in context.siblings)
        number = jnp.int32(before) + jnp.asarray(context.index, jnp.int32)
        r = min(self.rank, site.d_in, site.d_out)
        u, s, vt = numerics.svd(context.weight())
        root, own = jnp.sqrt(s[:r]), jax.random.fold_in(jax.random.key(self.seed), number)
        drawn = jax.random.normal(own, (self.size, r, r), site.param_dtype)
        frozen = {
            "a": u[:, :r] * root[None, :],
            "b": root[:, None] * vt[:r],
            "p": drawn / math.sqrt(r),
            "group": group_of(number, count, groups_of(count, self.tying)),
        }
        return {}, frozen

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] = A times the mix, v [r, d_out] = B."""
        own = p["v"].at[p["group"]].get(mode="promise_in_bounds")
        mixed = jnp.tensordot(own, p["p"], axes=1, precision="highest")
        return numerics.matmul(p["a"], mixed), p["b"]


SYSTEM = System(
    name="TinyLoRA",
    paper="2026, 2602.04118",
    symbol="TinyLoRA",
    evidence="the mix one matrix at a time; PEFT's random matrices without torch; outputs of torch "
    "PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py", "tests/torch_random_test.py"),
    missing="the paper was not read; its claim (reinforcement learning of a reasoning model)",
    examples=(TinyLoRA(rank=2, size=5, tying=1.0),),
)
