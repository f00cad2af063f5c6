"""SHiRA: a few entries of the weight, chosen at random once, are trained.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
c                   `c` [n], trained
:math:`i_k, o_k`    `rows`, `cols` [n], int32, frozen, no place twice
==================  ===========================================================

.. math::
    W' = W + \\sum_k c_k \\, e_{i_k} e_{o_k}^T, \\qquad
    y_o = (x W)_o + \\sum_{k: o_k = o} c_k x_{i_k}

with n = r (d_in + d_out), as many numbers as LoRA of rank r; the delta has high rank, and adapters
of other places hardly meet. For a batch of tokens W' is formed, since that takes fewer operations
(`jlora.methods.sparse.formed` counts them); for one token it is not. Init: c = 0,
hence the identity.

Bhardwaj et al., `Sparse High Rank Adapters <https://arxiv.org/abs/2406.13175>`_, 2024.

Source: paper (SHiRA-Rand); count of the entries as PEFT 0.21.
Deviates: places come from JAX's generator; those of PEFT files are read as arrays. The choices by
weight or gradient of the paper are made by giving `rows` and `cols` other values.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.sparse import formed
from jlora.system import System
from jlora.types import Dynamic


def sparse_product(
    x: Float[Array, "... d_in"],
    c: Float[Array, "n"],
    rows: Int[Array, "n"],
    cols: Int[Array, "n"],
    d_out: int,
) -> jax.Array:
    """x times a matrix of n entries, which is not formed.

    Args:
      x: activations.
      c: values of the entries.
      rows: of the entries, below d_in.
      cols: of the entries, below d_out; entries of one place add up.
      d_out: columns of the matrix.

    Returns:
      [..., d_out], of the dtype of c.
    """

    def one(x: jax.Array) -> jax.Array:
        taken = x.at[rows].get(mode="promise_in_bounds").astype(c.dtype) * c
        return jnp.zeros(d_out, c.dtype).at[cols].add(taken, mode="promise_in_bounds")

    for _ in range(x.ndim - 1):
        one = jax.vmap(one)
    return one(x)


def scattered(
    w: Float[Array, "d_in d_out"],
    c: Float[Array, "n"],
    rows: Int[Array, "n"],
    cols: Int[Array, "n"],
) -> jax.Array:
    """A matrix with entries added.

    Args:
      w: the matrix.
      c: what is added, cast to the dtype of w.
      rows: of the entries, below d_in.
      cols: of the entries, below d_out.

    Returns:
      [d_in, d_out].
    """
    return w.at[rows, cols].add(c.astype(w.dtype), mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class SHiRA(Method):
    """Sparse adapter of as many entries as LoRA of `rank` has numbers.

    Raises:
      ValueError: rank < 1; at init, more entries than the weight has.
    """

    rank: int = 32

    def __post_init__(self) -> None:
        check_whole("SHiRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """c [n] = 0; frozen rows, cols [n] int32, sorted by column."""
        count, size = self.rank * (site.d_in + site.d_out), site.d_in * site.d_out
        if count > size:
            raise ValueError(
                f"{site.path}: SHiRA rank: got {self.rank}, which is {count} entries, expected at "
                f"most {size}"
            )
        flat = jnp.sort(jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))[:count])
        rows, cols = flat % jnp.int32(site.d_in), flat // jnp.int32(site.d_in)
        return {"c": jnp.zeros(count, site.param_dtype)}, {"rows": rows, "cols": cols}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w with c added at its places."""
        return scattered(w, p["c"], p["rows"], p["cols"])

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        if not formed.entries_are_cheaper(p["c"].size, formed.tokens(x), w.shape):
            return formed.times_formed(self, x, w, p)
        y = x @ w
        delta = sparse_product(x, p["c"], p["rows"], p["cols"], y.shape[-1])
        return y + delta.astype(y.dtype)


SYSTEM = System(
    name="SHiRA",
    paper="Bhardwaj 2024, 2406.13175",
    symbol="SHiRA",
    evidence="entries against a dense matrix; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    claim="shira",
    examples=(SHiRA(rank=1),),
    breaks={"L4": formed.WHY},
)
