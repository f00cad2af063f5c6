r"""TeRA: a tensor network of frozen random factors that all sites share; diagonals are trained.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]; d_in = i_1 i_2, d_out = o_1 o_2
:math:`U^{(n)}`    `u_i1`, `u_i2`, `u_o1`, `u_o2`: [i_1, R], ..., frozen, shared
G                  `core` [R, R, R, R], frozen, shared
:math:`d^{(n)}`    `d_i1`, `d_i2`, `d_o1`, `d_o2`: [R], trained, per site
s                  `scale`: alpha
=================  ===========================================================

.. math::
    \Delta = s \, G \times_1 U^{(1)} \mathrm{diag}(d^{(1)}) \times_2 \dots
    \times_4 U^{(4)} \mathrm{diag}(d^{(4)}), \qquad W' = W + \mathrm{matrix}(\Delta)

Both sides of the weight are split into two modes as even as divisors allow. Unfolded it is a chain
(U1 d1 ⊗ U2 d2) G (U3 d3 ⊗ U4 d4)^T, so the rank of the delta is up to R^2 for 4 R trained numbers;
LoRA has rank n for n (d_in + d_out). Shared factors are made for the largest modes of all sites,
each site uses their first rows.

Init: :math:`d^{(3)} = 0` (of the first output mode), the others 1, hence the identity;
U is N(0, 1/R), G is N(0, 1), which makes the entries of a delta with all d = 1 of unit size.

Gu et al., `TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of Large Language
Models <https://arxiv.org/abs/2509.03234>`_, 2025.

Source: abstract: a Tucker-like network, core and factors random, frozen and shared, diagonals per
layer trained.
Deviates: the number of modes, which diagonal is zero, the distributions and the scale are not in
the abstract; they are choices made here (`zero` names the diagonal).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System

MODES = ("i1", "i2", "o1", "o2")


def modes(size: int) -> tuple[int, int]:
    """The most even pair of divisors of a size.

    Args:
      size: d_in or d_out.

    Returns:
      (n, m) with n m == size and n <= m.
    """
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


@dataclasses.dataclass(frozen=True)
class TeRA(Method):
    """Tensor-network adapter; factors and core are one group for all sites of the pattern.

    Raises:
      ValueError: rank < 1, an unknown mode.
    """

    rank: int = 8
    alpha: float = dataclasses.field(default=1.0, compare=False)
    zero: str = "o1"  # the mode whose diagonal starts at 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("TeRA.rank", self.rank)
        if self.zero not in MODES:
            raise ValueError(f"TeRA.zero: got {self.zero!r}, expected one of {MODES}")

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Frozen u_i1, u_i2, u_o1, u_o2 and core of `seed`; `key` is not used."""
        dtype = max((s.param_dtype for s in sites), key=lambda d: jnp.dtype(d).itemsize)
        keys = jax.random.split(jax.random.key(self.seed), 5)
        sizes = [(*modes(s.d_in), *modes(s.d_out)) for s in sites]
        out = {
            f"u_{name}": jax.random.normal(k, (max(rows), self.rank), dtype) / math.sqrt(self.rank)
            for name, k, rows in zip(MODES, keys, zip(*sizes, strict=True), strict=False)
        }
        return {}, {**out, "core": jax.random.normal(keys[4], (self.rank,) * 4, dtype)}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """d_i1, d_i2, d_o1, d_o2 [R]; frozen rows_i1, ... int32, the rows that are used, scale."""
        value = {name: 0.0 if name == self.zero else 1.0 for name in MODES}
        trainable = {f"d_{n}": jnp.full(self.rank, v, site.param_dtype) for n, v in value.items()}
        sizes = (*modes(site.d_in), *modes(site.d_out))
        rows = {f"rows_{n}": jnp.arange(k, dtype=jnp.int32)
                for n, k in zip(MODES, sizes, strict=True)}  # fmt: skip
        return trainable, {**rows, "scale": jnp.asarray(self.alpha, jnp.float32)}

    def factors(self, p: Arrays) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
        """u [d_in, R^2] with the core in it, v [R^2, d_out]."""
        scaled = {
            n: p[f"u_{n}"].at[p[f"rows_{n}"]].get(mode="promise_in_bounds") * p[f"d_{n}"][None, :]
            for n in MODES
        }
        r2 = self.rank**2
        u = numerics.einsum("ia,jb->ijab", scaled["i1"], scaled["i2"]).reshape(-1, r2)
        v = numerics.einsum("kc,ld->cdkl", scaled["o1"], scaled["o2"]).reshape(r2, -1)
        return numerics.matmul(u, p["core"].reshape(r2, r2)) * p["scale"], v


SYSTEM = System(
    name="TeRA",
    paper="Gu 2025, 2509.03234",
    symbol="TeRA",
    evidence="the network mode by mode in float64; rank R^2 from 4 R numbers",
    rows=(13,),
    claim="tera",
    examples=(TeRA(rank=2, alpha=0.5),),
)
