"""DoRA: a learned length for every column of the weight, and LoRA for its direction.

Symbols: A -> `a` [d_in, r]; B -> `b` [r, d_out]; m -> `m` [d_out]; s = alpha / rank -> `scale`.

.. math::
    W' = V \\, \\mathrm{diag}(m / \\|V\\|_c), \\qquad V = W + s A B

with :math:`\\|V\\|_c` the norms of the columns (one an output feature), taken as constants by the
gradient (section 4.3 of the paper). V is never formed; its norms are

.. math::
    \\|V\\|_c^2 = \\|W\\|_c^2 + 2 s \\, 1^T (A^T W \\odot B) + s^2 \\, 1^T (A^T A B \\odot B)

which costs 2 r d_in d_out a step alongside the 2 T d_in d_out of the matmul, and no memory. Where
the sum is below a sixteenth of its terms, because W and s A B nearly cancel in a column (or the
columns of A do in A B), it has lost digits: such columns are measured on V itself, block by block
of rows, in a loop that takes no step where there are none. A norm is then off by what rounding V
costs,

.. math:: \\epsilon \\, (\\|W\\|_c + \\|s |A| |B|\\|_c)

or less: 1e-6 of itself in float32, and 1e-4 where a thousandth of the column is left, in `apply` as
in `merge`. Of an activation in bfloat16, x W alone is rounded to 4e-3 of :math:`\\|W\\|_c`: merge
an adapter that cancels columns.

Init: A uniform in ±1/sqrt(d_in), B = 0, m = the norms of W, hence the identity. A column of zeros
stays zero until V has one that is not.

Liu et al., `DoRA: Weight-Decomposed Low-Rank Adaptation <https://arxiv.org/abs/2402.09353>`_, 2024.

Source: paper; detached norm, init and the bias left outside as PEFT 0.21.
Deviates: closed-form norms (PEFT forms V in every step). The norm is detached in `merge` too, so
that gradients through the definition are the paper's.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic

LOST = 1 / 16  # of its terms: a smaller sum is computed again
BLOCKS = 32  # the most blocks of rows in which that is done


def column_norms(
    w: Float[Array, "d_in d_out"],
    a: Float[Array, "d_in r"],
    b: Float[Array, "r d_out"],
    scale: Float[Array, ""],
) -> jax.Array:
    """The norms of the columns of w + scale a b, without forming it.

    A gradient must not pass (the loop has none): give it what `jax.lax.stop_gradient` returns.

    Args:
      w: base matrix of any floating dtype.
      a: first factor.
      b: second factor, of the dtype of a.
      scale: of the dtype of a.

    Returns:
      [d_out], in the dtype of a.
    """
    return _norms(w.astype(a.dtype), a, scale * b, axis=0)


def row_norms(
    w: Float[Array, "d_in d_out"], u: Float[Array, "d_in r"], v: Float[Array, "r d_out"]
) -> jax.Array:
    """The norms of the rows of w + u v, likewise.

    Args:
      w: base matrix of any floating dtype.
      u: first factor.
      v: second factor.

    Returns:
      [d_in], in the dtype of u.
    """
    return _norms(w.astype(u.dtype), u, v, axis=1)


@functools.partial(jax.jit, static_argnames="axis")  # one trace for all sites of a shape
def _norms(w: jax.Array, u: jax.Array, v: jax.Array, axis: int) -> jax.Array:
    """The norms along `axis` of w + u v."""
    square, lost = _closed(w, u, v) if axis == 0 else _closed(w.T, v.T, u.T)
    d_in, d_out = w.shape
    count = max(n for n in range(1, BLOCKS + 1) if d_in % n == 0)
    steps = jnp.where(jnp.any(lost), jnp.int32(count), jnp.int32(0))
    # Block k has the rows k, k + count, ...: where rows are sharded, each shard has a part of it.
    shape = square.shape if axis == 0 else (-1, count)
    lost, start = lost.reshape(shape), jnp.where(lost, 0, square).reshape(shape)

    def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        k, total = state
        # Cut inside of the loop: it then takes w as the matmul does, not a copy in another shape.
        parts, left = w.reshape(-1, count, d_out), u.reshape(-1, count, u.shape[1])
        part, rows = (lax.dynamic_index_in_dim(t, k, 1, keepdims=False) for t in (parts, left))
        with jax.default_matmul_precision("highest"):
            again = jnp.sum(jnp.square(part + rows @ v), axis=axis)
        if axis == 0:
            return k + 1, total + jnp.where(lost, again, 0)
        old, mine = (lax.dynamic_index_in_dim(t, k, 1, keepdims=False) for t in (total, lost))
        return k + 1, lax.dynamic_update_index_in_dim(total, jnp.where(mine, again, old), k, 1)

    # A loop and no branch: mapped over a bank, both sides of a branch would run for all of it.
    total = lax.while_loop(lambda s: s[0] < steps, add, (jnp.zeros_like(steps), start))[1]
    return jnp.sqrt(total.reshape(square.shape))


def _closed(w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(squared norms, where they have lost digits), [d_out] each, of the columns of w + a b."""
    with jax.default_matmul_precision("highest"):
        length, gram = jnp.sum(w * w, axis=0), a.T @ a
        square = length + jnp.sum((2 * (a.T @ w) + gram @ b) * b, axis=0)
        terms = length + jnp.sum(a * a, axis=0) @ (b * b)
    return jnp.maximum(square, 0), square < LOST * terms


@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """Weight-decomposed LoRA.

    Raises:
      ValueError: rank < 1.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    rslora: bool = dataclasses.field(default=False, compare=False)  # s = alpha / sqrt(rank)

    def __post_init__(self) -> None:
        check_whole("DoRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_in, r], b [r, d_out] = 0, m [d_out] = the column norms of W; frozen scale []."""
        w, bound = context.weight(), 1 / math.sqrt(site.d_in)
        a = jax.random.uniform(key, (site.d_in, self.rank), w.dtype, -bound, bound)
        b = jnp.zeros((self.rank, site.d_out), w.dtype)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        scale = jnp.asarray(scale, w.dtype)
        return {"a": a, "b": b, "m": jnp.sqrt(jnp.sum(w * w, axis=0))}, {"scale": scale}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """(w + s a b) m / |w + s a b|, [d_in, d_out]."""
        v = w + p["scale"] * (p["a"] @ p["b"])
        norm = jnp.linalg.norm(jax.lax.stop_gradient(v), axis=0)
        return v * gain(p["m"], norm)[None, :]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]."""
        y = x @ w
        y = y + low_rank(x, p["scale"] * p["a"], p["b"]).astype(y.dtype)
        fixed = jax.lax.stop_gradient((w.dense(), p["a"], p["b"], p["scale"]))
        by = gain(p["m"], column_norms(*fixed)).astype(y.dtype)
        return y * by.reshape(*[1] * (y.ndim - 1), -1)


def gain(m: Float[Array, "..."], norm: Float[Array, "..."]) -> jax.Array:
    """m over the norms; 1 for a column of zeros, which no gain can change.

    Args:
      m: magnitudes.
      norm: the norms at present.

    Returns:
      [...].
    """
    live = norm > 0
    one = jnp.ones_like(norm)
    return jnp.where(live, m / jnp.where(live, norm, one), one)


SYSTEM = System(
    name="DoRA",
    paper="Liu 2024, 2402.09353",
    symbol="DoRA",
    evidence="gradient by hand, no dense V in the jaxpr; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    claim="dora",
    examples=(DoRA(rank=2),),
)
