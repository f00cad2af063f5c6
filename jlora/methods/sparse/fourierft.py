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

With few tokens or coefficients these factors run: 2 n (d_in + d_out) multiply-adds per token and
pass, of which there are three. Otherwise the delta is formed. Cosine is even, so with C [d_in,
d_out] of which c are the entries it is also the real part of the forward transform,

.. math:: \\Delta W = \\frac{s}{d_{in} d_{out}} \\, \\mathrm{Re} \\, \\mathcal{F}(C)

which of real numbers is half a transform, in 5/4 d_in d_out log2(d_in d_out) multiply-adds. The map
is symmetric, so the gradient of c is gathered from that of the weight, transformed once more. The
formed weight is kept for the backward pass, as PEFT keeps its delta. What is counted:
`jlora.methods.sparse.formed`.

The frequencies are drawn by `seed` alone, with torch's generator: files of PEFT do not hold them.
Init: c = 0, hence the identity.

Gao et al., `Parameter-Efficient Fine-Tuning with Discrete Fourier Transform
<https://arxiv.org/abs/2405.03003>`_, 2024.

Source: paper; frequencies as PEFT 0.21 draws them.
Deviates: PEFT starts from normal coefficients, which are no identity (its `init_weights=True` is
zero, as here), and forms the delta in every step, with a product of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.sparse import formed
from jlora.methods.sparse.shira import scattered
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


def cosines(m: Float[Array, "d_in d_out"]) -> Float[Array, "d_in half"]:
    """The real part of the transform of a real matrix.

    Args:
      m: [d_in, d_out].

    Returns:
      Its first d_out // 2 + 1 columns; the others are these, mirrored at 0 along both axes.
    """
    rows = Layout(major_to_minor=(0, 1))  # the only one in which XLA's CPU transforms
    return with_layout_constraint(jnp.fft.rfft2(m), rows).real


def transformed(
    c: Float[Array, "n"], rows: Int[Array, "n"], cols: Int[Array, "n"], shape: tuple[int, int]
) -> Float[Array, "d_in d_out"]:
    """The real part of the transform of a sparse matrix, [d_in, d_out] = `shape`.

    Args:
      c: its entries.
      rows: of the entries, below d_in.
      cols: of the entries, below d_out.
      shape: (d_in, d_out).

    Returns:
      The sum over k of c[k] cos 2 pi (rows[k] i / d_in + cols[k] o / d_out) at [i, o].
    """
    return _transformed(c, rows, cols, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _transformed(c: Array, rows: Array, cols: Array, shape: tuple[int, int]) -> Dynamic:
    return _forward(c, rows, cols, shape)[0]


def _forward(c: Array, rows: Array, cols: Array, shape: tuple[int, int]) -> tuple[Array, Dynamic]:
    half = cosines(scattered(jnp.zeros(shape, c.dtype), c, rows, cols))
    rest = half[:, 1 : shape[1] - half.shape[1] + 1]
    whole = jnp.concatenate([half, jnp.roll(rest[::-1, ::-1], 1, axis=0)], axis=1)
    return whole, (rows, cols)


def _backward(shape: tuple[int, int], kept: tuple[Array, Array], g: Array) -> Dynamic:
    (rows, cols), (d_in, d_out) = kept, shape
    half = cosines(g)
    beyond = cols >= half.shape[1]
    rows = jnp.where(beyond, -rows % jnp.int32(d_in), rows)
    cols = jnp.where(beyond, jnp.int32(d_out) - cols, cols)
    return half.at[rows, cols].get(mode="promise_in_bounds"), None, None


_transformed.defvjp(_forward, _backward)


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
        c = p["scale"] * p["c"] / math.prod(w.shape)
        return w + transformed(c, p["rows"], p["cols"], (w.shape[0], w.shape[1])).astype(w.dtype)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; the factors, or the merged weight."""
        if isinstance(x, jax.Array):
            rows, shape = formed.tokens(x), w.shape
            factors = 6.0 * rows * self.count * sum(shape)
            if formed.cheaper(factors, rows, shape, forming=2.5 * math.log2(math.prod(shape))):
                return formed.times_formed(self, x, w, p, keep=True)
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
    breaks={"L4": formed.WHY},
)
