"""VeRA: one frozen random pair of bases for all sites, and two trained vectors per site.

Symbols: shared bases A -> `basis_a` [max d_in, r], B -> `basis_b` [r, max d_out], of which a site
uses the first rows / columns (`rows` [d_in]); d -> `d` [r]; b -> `b` [d_out].

.. math::
    \\Delta W = A_{:d_{in}} \\, \\mathrm{diag}(d) \\, B_{:, :d_{out}} \\, \\mathrm{diag}(b)

Init: A, B uniform in ±sqrt(6 / fan-in), d = `d_initial`, b = 0, hence the identity. The bases
depend on `seed` and on their shape alone, never on the key of `init`: adapters of one seed share
them, and a checkpoint need not hold them (`VeRA.shared` makes them again).

Kopiczko, Blankevoort and Asano, `VeRA <https://arxiv.org/abs/2310.11454>`_, 2024.

Source: paper; layout of the bases and bounds of their distribution as PEFT 0.21.
Deviates: the bases come from JAX's generator; those of PEFT files are read as arrays. There is no
scale, as in the paper.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core import compat
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


def random_bases(sites: tuple[Site, ...], seed: int, inner: int, rank: int) -> Arrays:
    """Two bases for all sites, uniform in ±sqrt(6 / fan-in), in the widest dtype of the sites.

    Args:
      sites: all sites of the method.
      seed: of the values, which depend on nothing else but the shapes.
      inner: columns of A.
      rank: rows of B.

    Returns:
      basis_a [max d_in, inner] and basis_b [rank, max d_out].
    """
    ka, kb = jax.random.split(jax.random.key(seed))
    rows, cols = max(s.d_in for s in sites), max(s.d_out for s in sites)
    dtype = max((s.param_dtype for s in sites), key=lambda d: jnp.dtype(d).itemsize)

    def uniform(key: jax.Array, shape: tuple[int, int], fan_in: int) -> jax.Array:
        bound = math.sqrt(6 / fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    a, b = uniform(ka, (rows, inner), rows), uniform(kb, (rank, cols), rank)
    return {"basis_a": a, "basis_b": b}


def bases(p: Arrays) -> tuple[jax.Array, jax.Array]:
    """The parts of the bases that a site uses.

    Args:
      p: basis_a [max d_in, R], basis_b [r, max d_out], rows [d_in] and b [d_out].

    Returns:
      [d_in, R], rows of A, and [r, d_out], columns of B.
    """
    a = p["basis_a"].at[p["rows"]].get(mode="promise_in_bounds")
    return a, p["basis_b"][:, : p["b"].shape[0]]


def scaled_bases(p: Arrays) -> tuple[jax.Array, jax.Array]:
    """The parts of the bases that a site uses, times its vectors.

    Args:
      p: basis_a [max d_in, R], basis_b [r, max d_out], rows [d_in], d [R] and b [d_out].

    Returns:
      [d_in, R] = rows of A times d, and [r, d_out] = columns of B times b.
    """
    a, b = bases(p)
    return a * p["d"][None, :], b * p["b"][None, :]


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random adapter; the bases are one group for all sites of the pattern.

    Raises:
      ValueError: rank < 1.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("VeRA.rank", self.rank)

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Frozen basis_a [max d_in, r], basis_b [r, max d_out] of `seed`; `key` is not used."""
        return {}, random_bases(sites, self.seed, self.rank, self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """d [r], b [d_out]; frozen rows [d_in] int32, the rows of basis_a that the site uses."""
        d = jnp.full(self.rank, self.d_initial, site.param_dtype)
        b = jnp.zeros(site.d_out, site.param_dtype)
        return {"d": d, "b": b}, {"rows": jnp.arange(site.d_in, dtype=jnp.int32)}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] = rows of A times d, v [r, d_out] = columns of B times b."""
        return scaled_bases(p)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; the vectors meet activations, the bases have no gradient.

        Scaled bases would have one, two products as large as those of the forward pass.
        """
        if not isinstance(x, jax.Array):  # rows of a table, patches of a convolution
            return super().apply(x, w, p, ctx)
        y = x @ w
        (a, b), lead = bases(p), tuple(range(x.ndim - 1))
        d, gain = (jnp.expand_dims(p[name].astype(x.dtype), lead) for name in ("d", "b"))
        inner = compat.matmul(x, a.astype(x.dtype)) * d
        return y + (compat.matmul(inner, b.astype(x.dtype)) * gain).astype(y.dtype)


SYSTEM = System(
    name="VeRA",
    paper="Kopiczko 2024, 2310.11454",
    symbol="VeRA",
    evidence="bases from the seed alone; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    claim="vera",
    examples=(VeRA(rank=4),),
)
