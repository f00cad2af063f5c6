"""HRA: the inputs of a weight are reflected by a chain of learned Householder reflections.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]
:math:`u_k`        the columns of `u` [d_in, r], trained, of any length above 0
=================  ===========================================================

.. math::
    W' = H_{r-1} \\cdots H_1 H_0 \\, W, \\qquad H_k = I - 2 \\, u_k u_k^T / \\|u_k\\|^2

The chain is one product of rank r (compact WY form): with the upper triangular r x r matrix T,

.. math::
    H_0 H_1 \\cdots H_{r-1} = I - U T U^T, \\qquad
    T^{-1} = \\mathrm{striu}(U^T U) + \\tfrac12 \\mathrm{diag}(U^T U)

so :math:`y = x W' = (x - x U T^T U^T) W` costs two thin products. W' has the singular values of W.
With `gram_schmidt` the u_k are made orthonormal first: the chain is the reflection at the space
that they span, :math:`I - 2 U (U^T U)^{-1} U^T`.

Init: columns in equal pairs, uniform in ±1/sqrt(their number), so that neighbours
cancel, hence the identity. With `gram_schmidt` no value of u is the identity: columns are drawn one
by one and a fresh adapter is a reflection.

Yuan, Liu and Xu, `Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder
Reflection Adaptation <https://arxiv.org/abs/2405.17484>`_, 2024.

Source: paper; pairs at the start as PEFT 0.21.
Deviates: PEFT multiplies out d_in x d_in matrices. With Gram-Schmidt its paired start is 0 / 0;
here the columns are drawn apart, and a file whose columns are dependent is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.core import compat
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class HRA(Method):
    """Householder reflection adapter of `rank` reflections.

    Trainable `u` [d_in, rank]. A column of zeros is no reflection.

    Raises:
      ValueError: rank < 1, or odd without `gram_schmidt`, whose start cannot be the identity.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"u": -1}

    rank: int = 8
    gram_schmidt: bool = False

    def __post_init__(self) -> None:
        check_whole("HRA.rank", self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """u [d_in, rank], equal in pairs but for `gram_schmidt`."""
        if self.rank % 2 and not self.gram_schmidt:
            raise ValueError(
                f"{site.path}: HRA rank: got {self.rank}, expected an even one, whose pairs cancel "
                "at the start"
            )
        columns = self.rank if self.gram_schmidt else self.rank // 2
        bound = 1 / math.sqrt(columns)
        u = jax.random.uniform(key, (site.d_in, columns), site.param_dtype, -bound, bound)
        return {"u": u if self.gram_schmidt else jnp.repeat(u, 2, axis=1)}, {}

    def core(self, u: Float[Array, "d_in r"]) -> jax.Array:
        """T, of which the chain is I - u T u.T.

        Args:
          u: the vectors.

        Returns:
          [r, r].
        """
        gram = numerics.einsum("ik,il->kl", u, u)
        length = jnp.diagonal(gram)
        live = length > 0
        one, none = jnp.ones_like(length), jnp.zeros_like(length)
        if self.gram_schmidt:
            return numerics.inv(gram / 2 + jnp.diag(jnp.where(live, none, one)))
        inverse = jnp.triu(gram, 1) + jnp.diag(jnp.where(live, length / 2, one))
        return jax.scipy.linalg.solve_triangular(inverse, jnp.eye(len(length), dtype=u.dtype))

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w - u T.T (u.T w), [d_in, d_out]."""
        u = p["u"]
        return w - (u @ self.core(u).T) @ (u.T @ w)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; for table rows and patches the weight is reflected."""
        u = p["u"]
        left = numerics.matmul(u, self.core(u).T)  # [d_in, r]
        if not isinstance(x, jax.Array):
            y = x @ w
            thin = compat.matmul(x, left.astype(x.dtype), thin=True)
            inner = numerics.matmul(u.T, w.dense())
            return y - (thin @ inner.astype(thin.dtype)).astype(y.dtype)
        thin = compat.matmul(x, left.astype(x.dtype), thin=True)
        return (x - compat.matmul(thin, u.T.astype(x.dtype), thin=True)) @ w


SYSTEM = System(
    name="HRA",
    paper="Yuan 2024, 2405.17484",
    symbol="HRA",
    evidence="the chain as one thin product, singular values kept; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    claim="hra",
    examples=(HRA(rank=4),),
)
