"""VB-LoRA: every factor is composed of vectors from one trained bank that all sites share.

============  =======================================================================
B             `bank` [h, l], trained, one for all sites of the pattern: h vectors
L_A, L_B      `logits_a` [r, d_in / l, h], `logits_b` [d_out / l, r, h], trained
k             `top_k`, how many vectors a piece is mixed from
============  =======================================================================

.. math::
    u = \\sum_{j \\in I} w_j B_j, \\quad I = \\mathrm{top}_k(L), \\quad w = \\mathrm{softmax}(L_I),
    \\qquad \\Delta W = A^T C

with u a piece of l entries of a row of A [r, d_in] or of C [r, d_out]. The gradient of
the bank is the sum over all pieces of all sites and layers.

Init: B uniform in ± `bank_bound`, L ~ N(0, `logits_std`^2). A fresh adapter is close to the
identity, but not equal to it: a bank of zeros could not learn.

Reference: Li et al. 2024, `VB-LoRA <https://arxiv.org/abs/2405.15179>`_; layouts and initial
values as PEFT 0.21.
Deviates: nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class VBLoRA(Method):
    """Vector-bank LoRA; the bank is one group for all sites of the pattern.

    Raises:
      ValueError: a size below 1, top_k above the number of vectors; at init, where `length` does
        not divide d_in and d_out.
    """

    rank: int = 4
    num_vectors: int = 256  # of the bank, h
    vector_length: int = 256  # l
    top_k: int = 2
    bank_bound: float = dataclasses.field(default=0.02, compare=False)
    logits_std: float = dataclasses.field(default=0.1, compare=False)

    def __post_init__(self) -> None:
        for name in ("rank", "num_vectors", "vector_length", "top_k"):
            check_whole(f"VBLoRA.{name}", getattr(self, name))
        if self.top_k > self.num_vectors:
            raise ValueError(f"VBLoRA.top_k: got {self.top_k}, expected 1..{self.num_vectors}")

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Trainable bank [h, l], in the widest dtype of the sites."""
        dtype = max((s.param_dtype for s in sites), key=lambda d: jnp.dtype(d).itemsize)
        shape, bound = (self.num_vectors, self.vector_length), self.bank_bound
        return {"bank": jax.random.uniform(key, shape, dtype, -bound, bound)}, {}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """logits_a [r, d_in / l, h] and logits_b [d_out / l, r, h]."""
        pieces = []
        for name, size in (("inputs", site.d_in), ("outputs", site.d_out)):
            if size % self.vector_length:
                raise ValueError(
                    f"{site.path}: got {size} {name}, expected a multiple of vector_length "
                    f"{self.vector_length}"
                )
            pieces.append(size // self.vector_length)
        ka, kb = jax.random.split(key)
        shapes = {"logits_a": (self.rank, pieces[0]), "logits_b": (pieces[1], self.rank)}
        return {
            name: self.logits_std
            * jax.random.normal(k, (*shape, self.num_vectors), site.param_dtype)
            for k, (name, shape) in zip((ka, kb), shapes.items(), strict=True)
        }, {}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r] = A^T and v [r, d_out] = C."""
        a = composed(p["logits_a"], p["bank"], self.top_k)  # [r, d_in / l, l]
        c = composed(p["logits_b"], p["bank"], self.top_k)  # [d_out / l, r, l]
        u = a.reshape(a.shape[0], -1).T
        return u, jnp.swapaxes(c, 0, 1).reshape(c.shape[1], -1)


def composed(logits: Float[Array, "... h"], bank: Float[Array, "h l"], top_k: int) -> jax.Array:
    """For each row of logits the softmax mix of its best vectors.

    Args:
      logits: one per vector of the bank.
      bank: h vectors of l entries.
      top_k: how many vectors a piece is mixed from.

    Returns:
      Pieces [..., l].
    """
    best, ids = jax.lax.top_k(logits, top_k)
    weights = jax.nn.softmax(best, axis=-1)
    vectors = bank.at[ids].get(mode="promise_in_bounds")
    return jnp.sum(weights[..., None] * vectors, axis=-2)


SYSTEM = System(
    name="VBLoRA",
    paper="Li 2024, 2405.15179",
    symbol="VBLoRA",
    evidence="value and the bank's gradient against NumPy over two sites; outputs of torch PEFT "
    "to 1e-5, its files back bitwise",
    tests=("tests/io/peft/shared_vectors_test.py",),
    claim="vblora",
    examples=(VBLoRA(rank=2, num_vectors=6, vector_length=4),),
    breaks={"L2": "a bank of zeros could not learn, so the paper starts near the identity"},
)
