"""C3A: a delta of circulant blocks, run by the Fourier transform.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out], in blocks of b x b
:math:`k_{mn}`     `kernel` [d_out / b, d_in / b, b], trained
=================  ===========================================================

.. math::
    \\Delta W_{(n,i), (m,o)} = \\frac{1}{d_{in}} \\, k_{mn}[(i - o) \\bmod b], \\qquad
    F(\\Delta y_m) = \\frac{1}{d_{in}} \\sum_n F(x_n) \\, \\overline{F(k_{mn})}

with F the Fourier transform of length b: T (d_in + d_out) log b + T d_in d_out / b operations, and
d_in d_out / b numbers, of a delta of any rank. Init: zeros, hence the identity.

Chen et al., `Parameter-Efficient Fine-Tuning via Circular Convolution
<https://arxiv.org/abs/2407.19342>`_, 2024.

Source: paper; direction of the shift and division by d_in as PEFT 0.21.
Deviates: PEFT starts from Xavier's uniform numbers, which are no identity (its `init_weights=True`
is zero, as here). Two of its adapters at once are not their sum: the second gets the first's output
as its input.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.blocks.blocks import check_divides
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class C3A(Method):
    """Block-circulant adapter with blocks of `block` x `block`.

    Raises:
      ValueError: block < 1; at init, a block that does not divide d_in and d_out.
    """

    block: int = 256

    def __post_init__(self) -> None:
        check_whole("C3A.block", self.block)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """kernel [d_out / block, d_in / block, block], zeros."""
        n = self.block
        check_divides("C3A", n, site)
        shape = (site.d_out // n, site.d_in // n, n)
        return {"kernel": jnp.zeros(shape, site.param_dtype)}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + the circulant blocks, [d_in, d_out]."""
        steps = np.arange(self.block)
        shifted = p["kernel"][:, :, (steps[:, None] - steps[None]) % self.block]  # [m, n, i, o]
        return w + shifted.transpose(1, 2, 0, 3).reshape(w.shape) / w.shape[0]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        y, kernel = x @ w, p["kernel"]
        blocks = x.astype(kernel.dtype).reshape(*x.shape[:-1], -1, self.block)
        spectrum = jnp.einsum(
            "...nf,mnf->...mf", jnp.fft.rfft(blocks), jnp.conj(jnp.fft.rfft(kernel))
        )
        delta = jnp.fft.irfft(spectrum, self.block).reshape(y.shape) / x.shape[-1]
        return y + delta.astype(y.dtype)


SYSTEM = System(
    name="C3A",
    paper="Chen 2024, 2407.19342",
    symbol="C3A",
    evidence="a circulant block commutes with a shift; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    claim="c3a",
    examples=(C3A(block=4),),
)
