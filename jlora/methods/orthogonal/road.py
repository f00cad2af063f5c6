"""RoAd: the outputs of a weight, in pairs, are rotated in the plane and scaled.

===============================  ===========================================================
W                                `w`, frozen, [d_in, d_out]
:math:`\\theta`, :math:`\\alpha`   `theta`, `alpha` [v d_out / 2], trained, v the `variant`
===============================  ===========================================================

The outputs are cut into groups of g; output k of the first half of a group and output k of its
second half are a pair (y, z):

.. math::
    y' = c_1 y - s_1 z, \\quad z' = s_2 y + c_2 z, \\qquad
    c = \\alpha \\cos\\theta, \\quad s = \\alpha \\sin\\theta

Variant 1 has one angle and one scale per pair (c_1 = c_2, s_1 = s_2), variant 2 one for each of its
two outputs, variant 4 one for each of the four numbers. Each output of W' is a mixture of two of W,
:math:`W' = W R`. Init: theta = 0, alpha = 1, hence the identity.

Liao and Monz, `3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability <https://arxiv.org/abs/2409.00119>`_, 2024.

Source: paper; pairing by halves of a group and order of the numbers as PEFT 0.21.
Deviates: PEFT turns the bias of the module as well; here the matrix alone (so a PEFT file is read
for modules without a bias).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class RoAd(Method):
    """2-D rotary adapter; `variant` 1, 2 or 4 numbers of each kind per pair, groups of `group`.

    Raises:
      ValueError: another variant, an odd group; at init, a group that does not divide d_out.
    """

    variant: int = 1
    group: int = 64

    def __post_init__(self) -> None:
        check_whole("RoAd.group", self.group, 2)
        if self.variant not in (1, 2, 4):
            raise ValueError(f"RoAd.variant: got {self.variant!r}, expected 1, 2 or 4")
        if self.group % 2:
            raise ValueError(f"RoAd.group: got {self.group}, expected an even number")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """theta [variant d_out / 2] = 0, alpha of the same shape = 1."""
        if site.d_out % self.group:
            raise ValueError(
                f"{site.path}: RoAd group: got {self.group}, expected a divisor of d_out = "
                f"{site.d_out}"
            )
        size = self.variant * site.d_out // 2
        zeros = jnp.zeros(size, site.param_dtype)
        return {"theta": zeros, "alpha": zeros + 1}, {}

    def rotated(self, y: Float[Array, "... d_out"], p: Arrays) -> jax.Array:
        """y [..., d_out] in the dtype of y, every pair rotated.

        Args:
          y: outputs.
          p: the arrays, as `prepare` returns them.

        Returns:
          [..., d_out].
        """
        half = self.group // 2
        c, s = (p["alpha"] * wave(p["theta"]) for wave in (jnp.cos, jnp.sin))
        if self.variant == 4:  # of each group first the cosines of its outputs, then their sines
            c, s = (t.reshape(-1, 2, 2, half)[:, k] for k, t in enumerate((c, s)))
        else:
            c, s = (t.reshape(-1, self.variant, half) for t in (c, s))
        c, s = (jnp.broadcast_to(t, (t.shape[0], 2, half)).astype(y.dtype) for t in (c, s))
        pairs = y.reshape(*y.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = jnp.stack([-second, first], axis=-2)
        lead = (1,) * (y.ndim - 1)
        c, s = c.reshape(*lead, *c.shape), s.reshape(*lead, *s.shape)
        return (pairs * c + turned * s).reshape(y.shape)

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """Every row of w rotated, [d_in, d_out]."""
        return self.rotated(w, p)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]: the outputs of the model's own matmul, rotated."""
        return self.rotated(x @ w, p)


SYSTEM = System(
    name="RoAd",
    paper="Liao 2024, 2409.00119",
    symbol="RoAd",
    evidence="pairs keep their length; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    claim="road",
    examples=(RoAd(group=4), RoAd(variant=4, group=4)),
)
