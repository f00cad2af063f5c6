r"""RandLoRA: many frozen random low-rank products, of which each site trains the weights.

=================  ===========================================================
W                  `w`, frozen, [d_in, d_out]; d the smaller side, D the larger
A                  `basis_a` [r, max d], frozen, shared by all sites
:math:`B_j`        `basis_b` [max D, N, r], frozen, shared by all sites
:math:`\Lambda`    `lam` [r, N], trained
:math:`\Gamma`     `gamma` [N, d], trained
s                  `scale`: alpha / r
=================  ===========================================================

.. math::
    \Delta = s \sum_{j=1}^{N}
    B_j \, \mathrm{diag}(\Lambda_{:j}) \, A \, \mathrm{diag}(\Gamma_j), \qquad
    N = \lceil d / r \rceil

is D x d, the delta where d_out is the smaller side and its transpose where it is not. N products of
rank r reach full rank with N (r + d) numbers. Init: Lambda = 0, hence the identity; Gamma is one
over the larger of its sides.

The scaled A of a site are together as large as W. The backward pass scales them again instead of
keeping them, and what reaches them, G [r, N, d], becomes the gradients of the weights at once
(k of the rank, j of the sum, i of the side):

.. math::
    \partial_{\Lambda_{kj}} = \sum_i G_{kji} A_{ki} \Gamma_{ji}, \qquad
    \partial_{\Gamma_{ji}} = \sum_k G_{kji} A_{ki} \Lambda_{kj}

Albert et al., `RandLoRA: Full-rank parameter-efficient fine-tuning of large models
<https://arxiv.org/abs/2502.00987>`_, 2025.

Source: paper; sharing, start and scale as PEFT 0.21.
Deviates: the bases come from JAX's generator, uniform and divided by their deviation; those of PEFT
files are read as arrays. PEFT pairs row k N + j of the scaled A with column k N + j of B as it lies
in memory, which is column (k N + j) mod r of the B whose number is the quotient, not column k of
B_j. This is the paper's sum with the columns of B, which are random, dealt out in another order; it
is done here too, so that files mean the same.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """Full-rank adapter from random bases of rank `rank`, one group for all sites of the pattern.

    Raises:
      ValueError: rank < 1.
    """

    rank: int = 32
    alpha: float = dataclasses.field(default=640.0, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("RandLoRA.rank", self.rank)

    def shared(self, key: PRNGKeyArray, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Frozen basis_a [r, max d], basis_b [max D, N, r] of `seed`; `key` is not used."""
        d_in, d_out = max(s.d_in for s in sites), max(s.d_out for s in sites)
        small, large = min(d_in, d_out), max(d_in, d_out)
        dtype = max((s.param_dtype for s in sites), key=lambda d: jnp.dtype(d).itemsize)
        ka, kb = jax.random.split(jax.random.key(self.seed))
        shape = (large, -(-small // self.rank), self.rank)
        a = jax.random.uniform(ka, (self.rank, small), dtype, -1, 1)
        b = jax.random.uniform(kb, shape, dtype, -1, 1)
        return {}, {"basis_a": a / jnp.std(a), "basis_b": b / jnp.std(b)}

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """lam [r, N] = 0, gamma [N, d]; frozen scale [], and rows [d_in], cols [d_out] int32.

        These two are the numbers of the rows of a basis that the inputs and the outputs use.
        """
        small = min(site.d_in, site.d_out)
        count = -(-small // self.rank)
        gamma = jnp.full((count, small), 1 / max(count, small), site.param_dtype)
        lam = jnp.zeros((self.rank, count), site.param_dtype)
        frozen = {
            "rows": jnp.arange(site.d_in, dtype=jnp.int32),
            "cols": jnp.arange(site.d_out, dtype=jnp.int32),
            "scale": jnp.asarray(self.alpha / self.rank, jnp.float32),
        }
        return {"lam": lam, "gamma": gamma}, frozen

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, r N], v [r N, d_out]: the side of A is the smaller one."""
        lam, gamma, (rows, cols) = p["lam"] * p["scale"], p["gamma"], (p["rows"], p["cols"])
        wide = rows.shape[0] <= cols.shape[0]
        small, large = (rows, cols) if wide else (cols, rows)
        a = p["basis_a"].T.at[small].get(mode="promise_in_bounds").T
        b = p["basis_b"].at[large].get(mode="promise_in_bounds")[:, : gamma.shape[0]]
        a = scaled(a, lam, gamma).reshape(-1, gamma.shape[1])  # [r N, d]
        b = b.reshape(b.shape[0], -1)  # [D, N r]
        return (a.T, b.T) if wide else (b, a)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """As the definition; the factors are made again in the backward pass."""
        if not isinstance(x, jax.Array):  # rows of a table, patches of a convolution
            return super().apply(x, w, p, ctx)
        y = x @ w
        branch = jax.checkpoint(lambda x, p: low_rank(x, *self.factors(p)))
        return y + branch(x, p).astype(y.dtype)


@jax.custom_vjp
def scaled(
    a: Float[Array, "r d"], lam: Float[Array, "r N"], gamma: Float[Array, "N d"]
) -> Float[Array, "r N d"]:
    """All scaled A; of the basis there is no gradient.

    Args:
      a: the shared basis.
      lam: Lambda, with the scale.
      gamma: Gamma.

    Returns:
      a[k, i] lam[k, j] gamma[j, i] at [k, j, i].
    """
    return a[:, None] * lam[:, :, None] * gamma[None]


def _forward(a: Array, lam: Array, gamma: Array) -> tuple[Array, tuple[Array, ...]]:
    return scaled(a, lam, gamma), (a, lam, gamma)


def _backward(kept: tuple[Array, ...], g: Array) -> tuple[None, Array, Array]:
    a, lam, gamma = kept
    g = g * a[:, None]
    precise = functools.partial(jnp.einsum, precision="highest")
    return None, precise("kji,ji->kj", g, gamma), precise("kji,kj->ji", g, lam)


scaled.defvjp(_forward, _backward)


SYSTEM = System(
    name="RandLoRA",
    paper="Albert 2025, 2502.00987",
    symbol="RandLoRA",
    evidence="full rank from few numbers; no scaled basis kept; outputs of torch PEFT to 1e-5",
    rows=(10,),
    tests=("tests/io/peft/types_test.py",),
    claim="randlora",
    examples=(RandLoRA(rank=3, alpha=6.0),),
)
