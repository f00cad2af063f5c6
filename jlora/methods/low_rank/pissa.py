"""PiSSA: LoRA that starts from the principal singular directions of the weight itself.

Symbols: A0, B0 -> frozen `a0` [d_in, r], `b0` [r, d_out], the top of the SVD; A, B -> `a`, `b`,
their trainable copies; s = alpha / rank -> `scale`.

.. math::
    W = U \\Sigma V^T, \\quad A_0 = U_r \\sqrt{\\Sigma_r / s}, \\quad
    B_0 = \\sqrt{\\Sigma_r / s} \\, V_r^T, \\qquad W' = (W - s A_0 B_0) + s A B

The base weight is not touched: what the paper subtracts from it is carried by the frozen leaves, so
one base serves PiSSA and any other adapter at once, and dropping the adapter restores the model.
With `niter` the SVD is randomised (Halko, Martinsson and Tropp, 2011) with that many power
iterations and 10 extra columns; A0 B0 is then approximate, W' still exact.

Meng, Wang and Zhang, `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024.

Source: paper; the split of the singular values and the scale as PEFT 0.21.
Deviates: frozen leaves instead of an edited base; exporters fold them into the PEFT convention.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@functools.partial(jax.jit, static_argnames=("rank", "niter"))  # else its loop is compiled anew
def randomized_svd(
    key: PRNGKeyArray, w: Float[Array, "m n"], rank: int, niter: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The approximate top of the SVD of a matrix.

    Args:
      key: of the sketch.
      w: the matrix.
      rank: how many directions.
      niter: power iterations.

    Returns:
      u [m, rank], s [rank], vt [rank, n].
    """
    size = min(rank + 10, *w.shape)
    q = numerics.qr(w @ jax.random.normal(key, (w.shape[1], size), w.dtype))[0]

    def power(_: int, q: jax.Array) -> jax.Array:
        return numerics.qr(w @ numerics.qr(w.T @ q)[0])[0]

    q = jax.lax.fori_loop(0, niter, power, q)
    u, s, vt = numerics.svd(q.T @ w)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


def principal(
    key: PRNGKeyArray, w: Float[Array, "d_in d_out"], rank: int, scale: Dynamic, niter: int | None
) -> tuple[jax.Array, jax.Array]:
    """Factors of the principal part of a weight, the singular values split evenly.

    Args:
      key: of the randomised SVD; not used without `niter`.
      w: the weight, [d_in, d_out].
      rank: how many singular directions, r.
      scale: what the product of the factors is multiplied with, [] or a float.
      niter: power iterations of the randomised SVD; None: the exact one.

    Returns:
      a [d_in, r] and b [r, d_out] with scale a b the best approximation of w of rank r.
    """
    u, s, vt = numerics.svd(w) if niter is None else randomized_svd(key, w, rank, niter)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root[None, :], root[:, None] * vt[:rank]


@dataclasses.dataclass(frozen=True)
class PiSSA(Method):
    """Principal-component LoRA; `niter` None takes the exact SVD.

    Raises:
      ValueError: rank is no integer of at least 1, or at init, is above min(d_in, d_out).
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "b": -2, "a0": -1, "b0": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    niter: int | None = None

    def __post_init__(self) -> None:
        check_whole("PiSSA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_in, r], b [r, d_out]; frozen a0, b0, equal to them, and scale []."""
        limit = min(site.d_in, site.d_out)
        if not 1 <= self.rank <= limit:
            raise ValueError(f"{site.path}: PiSSA rank expected in 1..{limit}, got {self.rank}")
        w, scale = context.weight(), self.alpha / self.rank
        a, b = principal(key, w, self.rank, scale, self.niter)
        return {"a": a, "b": b}, {"a0": a, "b0": b, "scale": jnp.asarray(scale, w.dtype)}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, 2 r] = s [a, a0], v [2 r, d_out] = [b; -b0]."""
        u = p["scale"] * jnp.concatenate([p["a"], p["a0"]], axis=1)
        return u, jnp.concatenate([p["b"], -p["b0"]], axis=0)

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + s (a b - a0 b0), [d_in, d_out]; exactly w at init."""
        return w + p["scale"] * (p["a"] @ p["b"] - p["a0"] @ p["b0"])

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; the two products cancel exactly at init."""
        y = x @ w
        delta = low_rank(x, p["scale"] * p["a"], p["b"])
        delta = delta - low_rank(x, p["scale"] * p["a0"], p["b0"])
        return y + delta.astype(y.dtype)


SYSTEM = System(
    name="PiSSA",
    paper="Meng 2024, 2404.02948",
    symbol="PiSSA",
    evidence="principal part against numpy's SVD",
    kind="composition",
    claim="pissa",
    examples=(PiSSA(rank=2),),
)
