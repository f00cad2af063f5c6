"""FourierFT: a few Fourier coefficients of the delta are trained.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
c                   `c` [n], trained, real
:math:`f_k, g_k`    `rows`, `cols` [n], int32, frozen: frequencies along inputs and outputs
s                   `scale` []
==================  ===========================================================

.. math::
    \\Delta W_{io} = \\frac{s}{d_{in} d_{out}} \\sum_k c_k \\cos 2\\pi
    \\Big( \\frac{f_k i}{d_{in}} + \\frac{g_k o}{d_{out}} \\Big)

that is, s times the real part of the inverse transform of a sparse matrix. The cosine of a sum is a
sum of products, so the delta has rank 2 n or less and factors of cosines and sines,

.. math:: \\cos(\\alpha + \\beta) = \\cos\\alpha \\cos\\beta - \\sin\\alpha \\sin\\beta

which are what runs: 4 n (d_in + d_out) operations per token, more than the matmul itself above
n = d_in d_out / 2 (d_in + d_out); merge before serving. The frequencies are drawn by `seed` alone,
with torch's generator: files of PEFT do not hold them. Init: c = 0, hence the identity.

Gao et al., `Parameter-Efficient Fine-Tuning with Discrete Fourier Transform
<https://arxiv.org/abs/2405.03003>`_, 2024.

Source: paper; frequencies as PEFT 0.21 draws them.
Deviates: PEFT starts from normal coefficients, which are no identity (its `init_weights=True` is
zero, as here), and forms the delta in every step.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, add_low_rank, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.torch_random import Generator
from jlora.types import Dynamic


def places(d_in: int, d_out: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct places of a matrix, as PEFT draws them.

    They are the first of the seed's permutation of the places of the [d_out, d_in] matrix, row by
    row.

    Args:
      d_in: rows of the matrix.
      d_out: its columns.
      count: how many places, at most d_in d_out.
      seed: of torch's generator.

    Returns:
      (rows, cols), int32 [count].
    """
    flat = Generator(seed).permutation(d_in * d_out, count).astype(np.int32)
    return flat % np.int32(d_in), flat // np.int32(d_in)


def check_count(name: str, site: Site, count: int) -> None:
    """Refuses more coefficients than a matrix has entries.

    Args:
      name: of the hyper-parameter, for the error.
      site: whose matrix it is.
      count: number of coefficients.

    Raises:
      ValueError: count > d_in d_out.
    """
    if count > site.d_in * site.d_out:
        raise ValueError(
            f"{site.path}: {name}: got {count}, expected at most {site.d_in * site.d_out}"
        )


@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    """Adapter of `count` Fourier coefficients, their places drawn by `seed`.

    Raises:
      ValueError: count < 1; at init, more coefficients than the weight has entries.
    """

    count: int = 1000
    scaling: float = dataclasses.field(default=150.0, compare=False)
    seed: int = 777

    def __post_init__(self) -> None:
        check_whole("FourierFT.count", self.count)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """c [count] = 0; frozen rows, cols [count] int32 of `seed`, and scale []."""
        check_count("FourierFT count", site, self.count)
        rows, cols = places(site.d_in, site.d_out, self.count, self.seed)
        frozen = {"rows": jnp.asarray(rows), "cols": jnp.asarray(cols)}
        frozen["scale"] = jnp.asarray(self.scaling, jnp.float32)
        return {"c": jnp.zeros(self.count, site.param_dtype)}, frozen

    def waves(self, p: Arrays, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """The delta as a product of waves.

        Args:
          p: the arrays of one site.
          shape: (d_in, d_out).

        Returns:
          u [d_in, 2 n] of cosines, then sines, with coefficients and scale; v [2 n, d_out].
        """
        sides = []
        for name, size in zip(("rows", "cols"), shape, strict=True):
            turns = p[name][:, None] * jnp.arange(size, dtype=jnp.int32)[None] % jnp.int32(size)
            angle = turns.astype(p["c"].dtype) * (2 * math.pi / size)
            sides.append((jnp.cos(angle), jnp.sin(angle)))
        inner, outer = sides
        c = (p["scale"] * p["c"] / math.prod(shape))[:, None]
        return jnp.concatenate([c * inner[0], -c * inner[1]]).T, jnp.concatenate(outer)

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w plus all waves, [d_in, d_out]."""
        return add_low_rank(w, *self.waves(p, w.shape))

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]."""
        y = x @ w
        return y + low_rank(x, *self.waves(p, w.shape)).astype(y.dtype)


SYSTEM = System(
    name="FourierFT",
    paper="Gao 2024, 2405.03003",
    symbol="FourierFT",
    evidence="cosines one by one; PEFT's places without torch; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py", "tests/torch_random_test.py"),
    claim="fourierft",
    examples=(FourierFT(count=15, scaling=40.0),),
)
