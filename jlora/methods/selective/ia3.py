"""IA3: one learned factor for every output (or input) feature of a kernel.

Symbol: l -> `l`, [d_out] for side = "out" (keys, values), [d_in] for side = "in" (the second
feed-forward kernel, whose inputs are the activations to be rescaled).

.. math::
    W' = W \\, \\mathrm{diag}(l) \\quad (out), \\qquad W' = \\mathrm{diag}(l) \\, W \\quad (in)

Init: l = 1, hence the identity. The bias that a model adds after the kernel is left as it is.

Liu et al., `Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
<https://arxiv.org/abs/2205.05638>`_, 2022.

Source: paper; PEFT 0.21 for which side is rescaled.
Deviates: on a convolution or a table, side = "in" has one factor for each of the d_in rows of the
matrix (PEFT: one a channel) and runs on the merged weight. LyCORIS stores l - 1.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Rescaling adapter; `side` is "out" or "in".

    Raises:
      ValueError: another side.
    """

    side: str = "out"

    def __post_init__(self) -> None:
        if self.side not in ("in", "out"):
            raise ValueError(f"IA3.side: expected 'in' or 'out', got {self.side!r}")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """l [d_out] or [d_in], all ones."""
        size = site.d_out if self.side == "out" else site.d_in
        return {"l": jnp.ones(size, site.param_dtype)}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """W diag(l) or diag(l) W, [d_in, d_out]."""
        return w * p["l"][None, :] if self.side == "out" else p["l"][:, None] * w

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; the factors go before or after the model's matmul."""
        if self.side == "out":
            y = x @ w
            return y * _row(p["l"], y)
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        return (x * _row(p["l"], x)) @ w


def _row(l: jax.Array, like: jax.Array) -> jax.Array:  # noqa: E741
    return l.astype(like.dtype).reshape(*[1] * (like.ndim - 1), -1)


SYSTEM = System(
    name="IA3",
    paper="Liu 2022, 2205.05638",
    symbol="IA3",
    evidence="outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    claim="ia3",
    examples=(
        IA3("out"),
        IA3("in"),
    ),
)
