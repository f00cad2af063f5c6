"""DEFT: what the weight has in a trained subspace of the outputs is taken out and replaced.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
P                   `p` [d_out, r], trained; spans the subspace
R                   `r` [d_in, r], trained; what is put there
s                   `scale`: alpha / r, or 1 without an alpha
==================  ===========================================================

.. math:: W' = W - W N Q^T + s \\, R Q^T = W + (s R - W N) \\, Q^T

with Q = P and N = relu(P) (`projection` "relu"), or Q = N the orthonormal factor of P ("qr"), where
:math:`N Q^T` is the orthogonal projection. With `remove` nothing is put in its place (PaRa): R = 0.

A step forms no delta: :math:`y = z + (s \\, x R - z N) Q^T` with z = x W. Init: P ~ N(0, 0.02^2)
and R = W N / s, hence the identity; with `remove` a fresh adapter is none.

`DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models
<https://arxiv.org/abs/2509.22793>`_, 2025; PaRa: Chen et al., `PaRa
<https://arxiv.org/abs/2406.05641>`_, 2024.

Source: peft 0.21.2 and its documentation (the papers' texts were not to be had).
Deviates: nothing that is known. "qr" takes the signs of LAPACK's factor, as torch on a CPU does.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import numerics
from jlora.core import compat
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class DEFT(Method):
    """Adapter that replaces a subspace of `rank` outputs.

    Raises:
      ValueError: rank < 1, another projection; at init, a rank above d_out.
    """

    rank: int = 8
    alpha: float | None = dataclasses.field(default=None, compare=False)
    projection: str = "relu"
    remove: bool = False

    def __post_init__(self) -> None:
        check_whole("DEFT.rank", self.rank)
        if self.projection not in ("relu", "qr"):
            raise ValueError(f"DEFT.projection: got {self.projection!r}, expected 'relu' or 'qr'")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """p [d_out, r], and without `remove` r [d_in, r]; frozen scale []."""
        if self.rank > site.d_out:
            raise ValueError(
                f"{site.path}: DEFT rank: got {self.rank}, expected at most d_out = {site.d_out}"
            )
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        p = 0.02 * jax.random.normal(key, (site.d_out, self.rank), site.param_dtype)
        trainable = {"p": p}
        if not self.remove:
            trainable["r"] = numerics.matmul(context.weight(), self.sides(p)[0]) / scale
        return trainable, {"scale": jnp.asarray(scale, jnp.float32)}

    def sides(self, p: Float[Array, "d_out r"]) -> tuple[jax.Array, jax.Array]:
        """The two sides of the projection.

        Args:
          p: the trained matrix.

        Returns:
          N and Q, [d_out, r] each: relu(p) and p, or twice the orthonormal factor of its QR.
        """
        if self.projection == "relu":
            return jax.nn.relu(p), p
        q, _ = numerics.qr(p)
        return q, q

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + (s r - w N) Q.T, [d_in, d_out]."""
        n, q = self.sides(p["p"])
        put = 0.0 if self.remove else p["scale"] * p["r"]
        return w + (put - w @ n) @ q.T

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]."""
        y, (n, q) = x @ w, self.sides(p["p"])
        inner = -compat.matmul(y, n.astype(y.dtype), thin=True)
        if not self.remove:
            put = (p["scale"] * p["r"]).astype(x.dtype)
            inner = inner + compat.matmul(x, put, thin=True).astype(y.dtype)
        return y + compat.matmul(inner, q.T.astype(y.dtype), thin=True)


SYSTEM = System(
    name="DEFT",
    paper="2025, 2509.22793; PaRa: Chen 2024, 2406.05641",
    symbol="DEFT",
    evidence="a projection takes its subspace out; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the papers were not read",
    examples=(DEFT(rank=2, alpha=3.0), DEFT(rank=2, projection="qr")),
)
