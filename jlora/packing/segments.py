r"""One pass over tokens of many jobs: each block of tokens has the adapter of its job.

==========  ==========================================================================
N, C, M     jobs, tokens of a row, tokens per block
j           ctx["jobs"] [..., C / M], int32: the job of each block
x_c         the tokens of block c, [M, d_in]
A_n, B_n    `job_a` [N, d_in, r], `job_b` [N, r, d_out], and `job_scale` s_n [N]: LoRA of job n
==========  ==========================================================================

.. math:: y_c = x_c W + s_{j_c} \, (x_c A_{j_c}) B_{j_c}

The product with W is one matmul for all jobs. The rest is split at the thin tensor x_c A, of which
r numbers per token are kept for the gradient. Only the blocks of job n reach A_n and B_n, so its
gradient is that of its own tokens, whatever the others are. Ranks may differ: `jl.stack` pads them
with zeros, whose gradients are zero.

Reference: LoRAFusion, Zhu et al. 2025, arXiv:2510.00206 (FusedMultiLoRA).
Deviates: a choice of factors and batched products in the place of a kernel; the scale is
alpha / rank, where a comment of the official code says so and its code multiplies by alpha.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.method import Wrapper
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic

JOBS = "jobs"  # name in ctx
PREFIX = "job_"  # of the names of arrays that have an axis of jobs


@dataclasses.dataclass(frozen=True)
class Segments(Wrapper):
    """LoRA of many jobs, one per block; its arrays have an axis of jobs in front.

    Not for `jl.init`: it stands for adapters that there are (`packed`).
    """

    block: int  # M, tokens

    @property
    def merges(self) -> bool:
        return False

    @property
    def indexed(self) -> bool:  # type: ignore[override]
        return False

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        raise NotImplementedError("Segments: stands for adapters that exist; use packed(bank)")

    def prepare(self, p: Arrays) -> Arrays:
        """The arrays as they are: those of a block are made float32 when they are picked."""
        return p

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., C, d_in] -> [..., C, d_out].

        Raises:
          ValueError: no ctx["jobs"], or not one job per block of x's tokens.
        """
        if JOBS not in ctx:
            raise ValueError('Segments: got no ctx["jobs"], expected the job of each block')
        jobs = ctx[JOBS]
        tokens = (*jobs.shape[:-1], jobs.shape[-1] * self.block)
        if x.shape[:-1] != tokens:
            raise ValueError(
                f'Segments: got ctx["jobs"] {jobs.shape} for tokens {x.shape[:-1]}, expected one '
                f"job per {self.block} tokens"
            )
        a, b, scale = (_picked(p[PREFIX + name], jobs) for name in ("a", "b", "scale"))
        y = x @ w
        parts = x.astype(jnp.float32).reshape(*jobs.shape, self.block, x.shape[-1])
        thin = jnp.einsum("...mi,...ir->...mr", parts, a) * scale[..., None, None]
        delta = jnp.einsum("...mr,...ro->...mo", thin, b)
        return y + delta.reshape(*tokens, b.shape[-1]).astype(y.dtype)


def _picked(bank: Array, jobs: Array) -> Array:
    """The arrays of each block's job, float32: a product, so that its gradient is one too."""
    chosen = jax.nn.one_hot(jobs, bank.shape[0], dtype=jnp.float32)
    flat = bank.astype(jnp.float32).reshape(bank.shape[0], -1)
    picked = jnp.matmul(chosen, flat, precision=jax.lax.Precision.HIGHEST)
    return picked.reshape(*jobs.shape, *bank.shape[1:])


def packed(bank: Adapter, block: int) -> Adapter:
    """A bank as the one adapter of packed rows.

    Args:
      bank: of `jl.stack`, LoRA without dropout, arrays [N, *stack, ...].
      block: M, tokens per block.

    Returns:
      An adapter for `jl.lift`, whose calls need ``ctx={"jobs": ...}``; arrays [*stack, N, ...].

    Raises:
      ValueError: another method than LoRA, dropout, one adapter, or a block below 1.
    """
    if block < 1:
        raise ValueError(f"block: got {block}, expected at least 1")
    len(bank)  # of one adapter: an error that says so
    known = {}
    for site, method in bank.sites:
        if type(method) is not LoRA or method.dropout:
            raise ValueError(f"{site.path}: got {method}, expected LoRA without dropout")
        known[site.path] = len(site.stack)

    def behind(part: Mapping[str, Arrays]) -> dict[str, Arrays]:
        return {
            path: {PREFIX + name: jnp.moveaxis(t, 0, known[path]) for name, t in arrays.items()}
            for path, arrays in part.items()
        }

    sites = tuple((site, Segments(method, block)) for site, method in bank.sites)
    return Adapter(behind(bank.trainable), behind(bank.frozen), sites)


def job_losses(
    losses: Float[Array, "*lead C"],
    weights: Float[Array, "*lead C"],
    jobs: Int[Array, "*lead C/M"],
    block: int,
    count: int,
) -> Float[Array, "n"]:
    """The sum of weighted token losses of each job.

    Args:
      losses: [..., C], of tokens.
      weights: [..., C], 0 for padding and for what is not learned.
      jobs: [..., C / M], int32.
      block: M.
      count: N.

    Returns:
      [N].
    """
    parts = (losses * weights).reshape(*jobs.shape, block).sum(-1)
    return jax.ops.segment_sum(parts.ravel(), jobs.ravel(), num_segments=count)
