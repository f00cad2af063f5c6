"""GLoRA: the weight is scaled and shifted by two supports of one form.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
A, B                the supports, each of the `form`
                    "lora": `a_in` [d_in, r], `a_out` [r, d_out], and `b_in`, `b_out`;
                    "vector": `a`, `b` [d_out]; "constant": `a`, `b` []
==================  ===========================================================

.. math:: W' = W + W \\odot A + B

with A and B broadcast to [d_in, d_out]. Init: a_out = b_out = 0 or a = b = 0, hence the identity;
a_in, b_in uniform in ±1/sqrt(d_in).

A step of the form "lora" forms W' and its gradient, as the entrywise product has no factors cheaper
than itself; the other forms scale the outputs and add the sum of the inputs, times b.

Chavan et al., `One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning
<https://arxiv.org/abs/2306.07967>`_, 2023.

Source: paper; forms as PEFT 0.21.
Deviates: the matrix alone; the paper's (and PEFT's) supports C, D and E, which change the bias by
itself and by the weight, are not here, so a PEFT file is read for modules without a bias.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic

FORMS = ("lora", "vector", "constant")


@dataclasses.dataclass(frozen=True)
class GLoRA(Method):
    """Generalised LoRA of a matrix.

    Raises:
      ValueError: rank < 1, an unknown form.
    """

    rank: int = 8
    form: str = "lora"

    def __post_init__(self) -> None:
        check_whole("GLoRA.rank", self.rank)
        if self.form not in FORMS:
            raise ValueError(f"GLoRA.form: got {self.form!r}, expected one of {list(FORMS)}")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a_in, b_in [d_in, r], a_out, b_out [r, d_out] = 0; or a, b [d_out] or [] = 0."""
        dtype, p = site.param_dtype, {}
        if self.form != "lora":
            zero = jnp.zeros((site.d_out,) if self.form == "vector" else (), dtype)
            return {"a": zero, "b": zero}, {}
        for name, k in zip("ab", jax.random.split(key), strict=True):
            bound, shape = 1 / math.sqrt(site.d_in), (site.d_in, self.rank)
            p[f"{name}_in"] = jax.random.uniform(k, shape, dtype, -bound, bound)
            p[f"{name}_out"] = jnp.zeros((self.rank, site.d_out), dtype)
        return p, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + w A + B entrywise, [d_in, d_out]; exactly w at init."""
        if self.form == "lora":
            return w + w * (p["a_in"] @ p["a_out"]) + p["b_in"] @ p["b_out"]
        a, b = (jnp.broadcast_to(p[k], w.shape[1:])[None] for k in "ab")
        return w + w * a + b

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; of "lora", rows and patches on the merged weight."""
        if self.form == "lora" or not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        y, total = x @ w, jnp.sum(x, axis=-1, keepdims=True, dtype=p["b"].dtype)
        lead = (1,) * (y.ndim - 1)
        a, b = (jnp.broadcast_to(p[k], y.shape[-1:]).reshape(*lead, -1) for k in "ab")
        return y + y * a.astype(y.dtype) + (total * b).astype(y.dtype)


SYSTEM = System(
    name="GLoRA",
    paper="Chavan 2023, 2306.07967",
    symbol="GLoRA",
    evidence="all three forms entry by entry; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the supports of the bias",
    examples=(GLoRA(rank=2),),
    breaks={"L4": "W * A has no factored form cheaper than itself"},
)
