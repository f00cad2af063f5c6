"""PVeRA: VeRA whose inner activation is a normal variable while it is trained.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]
A, B               shared, frozen: `basis_a` [max d_in, 2 r], `basis_b` [r, max d_out]
d, b               `d` [2 r], `b` [d_out], trained
=================  ===========================================================

.. math::
    [\\mu, \\ell] = (x A) \\, \\mathrm{diag}(d), \\qquad
    y = x W + (\\mu + e^{\\ell / 2} \\epsilon) \\, B \\, \\mathrm{diag}(b), \\quad
    \\epsilon \\sim N(0, I)

where the context has a `key`; without one :math:`\\epsilon = 0`, and the adapter is a VeRA of the
first r columns of A, which is what it merges to. Init: d = `d_initial`, b = 0, hence the identity.

Leclerc et al., `PVeRA: Probabilistic Vector-Based Random Matrix Adaptation
<https://arxiv.org/abs/2512.07703>`_, 2025.

Source: peft 0.21.2 (the paper's text was not to be had).
Deviates: the bases come from JAX's generator, of `seed`; those of PEFT files are read as arrays.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jlora.core import compat
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.shared_basis.vera import random_bases, scaled_bases
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class PVeRA(Method):
    """Probabilistic vector-based random adapter, one group for all sites of the pattern.

    Raises:
      ValueError: rank < 1.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("PVeRA.rank", self.rank)

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Frozen basis_a [max d_in, 2 r], basis_b [r, max d_out] of `seed`; `key` is not used."""
        return {}, random_bases(sites, self.seed, 2 * self.rank, self.rank)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """d [2 r], b [d_out] = 0; frozen rows [d_in] int32, the rows of basis_a that are used."""
        d = jnp.full(2 * self.rank, self.d_initial, site.param_dtype)
        b = jnp.zeros(site.d_out, site.param_dtype)
        return {"d": d, "b": b}, {"rows": jnp.arange(site.d_in, dtype=jnp.int32)}

    def parts(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """The two matrices between which the variable is drawn.

        Args:
          p: the arrays of one site with the shared bases.

        Returns:
          u [d_in, 2 r], to means and logarithms of variances, and v [r, d_out].
        """
        return scaled_bases(p)

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] to the means, v [r, d_out]."""
        u, v = self.parts(p)
        return u[:, : v.shape[0]], v

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; drawn with `ctx["key"]`, the mean without."""
        if "key" not in ctx:
            return super().apply(x, w, p, ctx)
        y, (u, v) = x @ w, self.parts(p)
        inner = compat.matmul(x, u.astype(x.dtype), thin=True)
        mean, log_variance = jnp.split(inner, 2, axis=-1)
        noise = jax.random.normal(ctx["key"], mean.shape, mean.dtype)
        inner = mean + jnp.exp(log_variance / 2) * noise
        return y + compat.matmul(inner, v.astype(inner.dtype), thin=True).astype(y.dtype)


SYSTEM = System(
    name="PVeRA",
    paper="Leclerc 2025, 2512.07703",
    symbol="PVeRA",
    evidence="mean and deviation of what is drawn; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the paper was not read",
    examples=(PVeRA(rank=3),),
)
