"""WaveFT: a few wavelet coefficients of the delta are trained.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
c                   `c` [n], trained
:math:`i_k, o_k`    `rows`, `cols` [n], int32, frozen: places in the transform
s                   `scale` []
==================  ===========================================================

With :math:`H_d` the synthesis of Haar's wavelet, one level (the first half of its columns are sums
of two neighbours, the second half differences, both over the root of two):

.. math::
    \\Delta W = s \\, H_{in} C H_{out}^T, \\quad C_{i_k o_k} = c_k, \\qquad
    y = x W + s \\, \\big( (x H_{in}) \\, C \\big) H_{out}^T

in d_in + d_out additions per row and no delta, where the tokens are few; for a batch of them W' is
formed, since that takes fewer operations (`jlora.methods.sparse.formed` counts them). Odd sides
are one longer and cut again. Without `wavelet`, H is the identity: entries of the weight itself.
The places are drawn by `seed` alone, with torch's generator: files of PEFT do not hold them.
Init: c = 0, hence the identity.

Bilican et al., `Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets
<https://arxiv.org/abs/2505.12532>`_, 2025.

Source: paper; places as PEFT 0.21 draws them, which takes a place in the upper right quarter for a
difference along the outputs, and in the lower left for one along the inputs.
Deviates: of PEFT's wavelet families "db1" (Haar) alone.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.sparse import formed, fourierft
from jlora.methods.sparse.shira import scattered, sparse_product
from jlora.system import System
from jlora.types import Dynamic


def places(
    d_in: int, d_out: int, count: int, seed: int, wavelet: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct places of the transform C, as PEFT has them.

    Args:
      d_in: rows of the weight.
      d_out: its columns.
      count: how many places, at most d_in d_out.
      seed: of torch's generator.
      wavelet: places of Haar's transform, whose sides are even; False: of the weight itself.

    Returns:
      (rows, cols), int32 [count].
    """
    rows, cols = fourierft.places(d_in, d_out, count, seed)
    if not wavelet:
        return rows, cols
    inner, outer = (np.int32((d + 1) // 2) for d in (d_in, d_out))
    difference_in, difference_out = cols >= outer, rows >= inner  # the quarters change sides
    return (
        rows % inner + inner * difference_in.astype(np.int32),
        cols % outer + outer * difference_out.astype(np.int32),
    )


def analysis(x: Float[Array, "... d"]) -> jax.Array:
    """x H: sums of neighbours, then their differences.

    Args:
      x: [..., d].

    Returns:
      [..., d], or [..., d + 1] where d is odd.
    """
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return jnp.concatenate([first + second, first - second], axis=-1) * math.sqrt(0.5)


def synthesis(x: Float[Array, "... d"], size: int) -> jax.Array:
    """x H^T: the inverse of `analysis`.

    Args:
      x: coefficients, d = `size` or `size` + 1.
      size: of the last axis of the result.

    Returns:
      [..., size].
    """
    halves = x.reshape(*x.shape[:-1], 2, -1)
    low, high = halves[..., 0, :], halves[..., 1, :]
    pairs = jnp.stack([low + high, low - high], axis=-1) * math.sqrt(0.5)
    return pairs.reshape(x.shape)[..., :size]


@dataclasses.dataclass(frozen=True)
class WaveFT(Method):
    """Adapter of `count` wavelet coefficients, their places drawn by `seed`.

    Raises:
      ValueError: count < 1; at init, more coefficients than the weight has entries.
    """

    count: int = 2592
    scaling: float = dataclasses.field(default=25.0, compare=False)
    seed: int = 777
    wavelet: bool = True  # Haar's; False: the entries themselves

    def __post_init__(self) -> None:
        check_whole("WaveFT.count", self.count)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """c [count] = 0; frozen rows, cols [count] int32 of `seed`, and scale []."""
        fourierft.check_count("WaveFT count", site, self.count)
        rows, cols = places(site.d_in, site.d_out, self.count, self.seed, self.wavelet)
        frozen = {"rows": jnp.asarray(rows), "cols": jnp.asarray(cols)}
        frozen["scale"] = jnp.asarray(self.scaling, jnp.float32)
        return {"c": jnp.zeros(self.count, site.param_dtype)}, frozen

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + s H C H.T, [d_in, d_out]."""
        c, (d_in, d_out) = p["scale"] * p["c"], w.shape
        if not self.wavelet:
            return scattered(w, c, p["rows"], p["cols"])
        sides = (d_in + d_in % 2, d_out + d_out % 2)
        table = scattered(jnp.zeros(sides, w.dtype), c, p["rows"], p["cols"])
        return w + synthesis(synthesis(table, d_out).T, d_in).T

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        if not formed.entries_are_cheaper(self.count, formed.tokens(x), w.shape):
            return formed.times_formed(self, x, w, p)
        y, c = x @ w, p["scale"] * p["c"]
        d_out, x = y.shape[-1], x.astype(c.dtype)
        x = analysis(x) if self.wavelet else x
        delta = sparse_product(x, c, p["rows"], p["cols"], d_out + (self.wavelet and d_out % 2))
        delta = synthesis(delta, d_out) if self.wavelet else delta
        return y + delta.astype(y.dtype)


SYSTEM = System(
    name="WaveFT",
    paper="Bilican 2025, 2505.12532",
    symbol="WaveFT",
    evidence="the transform inverts and keeps lengths; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the wavelet families other than Haar's",
    claim="waveft",
    examples=(WaveFT(count=15, scaling=3.0),),
    breaks={"L4": formed.WHY},
)
