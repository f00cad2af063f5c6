r"""NOLA: factors that are mixtures of random matrices, of which only the weights are kept.

=====================  ===========================================================
W                      `w`, frozen, [d_in, d_out]
:math:`A_i, B_i`       k random matrices each, [d_in, r] and [r, d_out], never stored
:math:`\alpha, \beta`  `alpha` [k], `beta` [k], trained: their weights
A_0                    `a0` [d_in, r], frozen
s                      `scale`: alpha / r (the hyper-parameter)
\                      `seed` [2, 2] uint32, frozen: where both families come from;
                       `cols` [d_out] int32, the numbers of the outputs
=====================  ===========================================================

.. math::
    A = A_0 + \sum_{i=1}^{k} \alpha_i A_i, \quad B = \sum_{i=1}^{k} \beta_i B_i, \qquad
    W' = W + s \, A B

2 k numbers per site, whatever the rank and the size of the weight. The bases are uniform in
±1/sqrt(k), of 2^16 values, and are drawn anew wherever they are needed, forward and backward, a few
at a time inside a loop; one call of the generator yields four numbers. Drawing all 2 k r (d_in +
d_out) of them in a step is what it costs above LoRA's.

With G the gradient of A, that of :math:`\alpha_i` is :math:`\langle G, A_i \rangle`: a rule of its
own, since autodiff of the loop would store every basis.

Init: alpha = beta = 0 and A_0 uniform in ±1/sqrt(d_in), hence the identity.

Koohpayegani et al., `NOLA: Compressing LoRA using Linear Combination of Random Basis
<https://arxiv.org/abs/2310.02556>`_, 2023.

Source: paper; A_0 as the official code has it (without it both gradients vanish at zero).
Deviates: every layer of a stack draws bases of its own; numbers have 16 random bits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry_2x32
from jaxtyping import Float, PRNGKeyArray, UInt

from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic

AT_ONCE = 8  # bases that exist at the same time


def mixture(
    weights: Float[Array, " k"], seed: UInt[Array, "2"], shape: tuple[int, int]
) -> Float[Array, "n m"]:
    """The sum of k random matrices, each times its weight.

    Args:
      weights: [k], trained.
      seed: key data of the family; the same seed draws the same matrices.
      shape: (n, m), of every matrix.

    Returns:
      [n, m], of the dtype of the weights.
    """
    return _mixture(weights, seed, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixture(weights: Array, seed: Array, shape: tuple[int, int]) -> Dynamic:
    size = len(weights)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        number, some = part
        bases = _bases(seed, number, shape, size, weights.dtype)
        return total + jnp.tensordot(some, bases, axes=1, precision="highest"), None

    start = jnp.zeros(shape, weights.dtype)
    return jax.lax.scan(add, start, (_numbers(size), _grouped(weights)))[0]


def _forward(weights: Array, seed: Array, shape: tuple[int, int]) -> Dynamic:
    return _mixture(weights, seed, shape), (jnp.zeros_like(weights), seed)


def _backward(shape: tuple[int, int], kept: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    like, seed = kept
    size = len(like)

    def inner(_: None, number: Array) -> tuple[None, Array]:
        bases = _bases(seed, number, shape, size, g.dtype)
        return None, jnp.tensordot(bases, g, axes=2, precision="highest")

    gradient = jax.lax.scan(inner, None, _numbers(size))[1]
    return gradient.reshape(-1)[:size].astype(like.dtype), None


_mixture.defvjp(_forward, _backward)


def _numbers(size: int) -> Array:
    return jnp.arange(-(-size // AT_ONCE), dtype=jnp.uint32)


def _grouped(weights: Array) -> Array:
    padding = -len(weights) % AT_ONCE
    return jnp.pad(weights, (0, padding)).reshape(-1, AT_ONCE)


def _bases(
    seed: Array, number: Array, shape: tuple[int, int], size: int, dtype: jnp.dtype
) -> Array:
    """[AT_ONCE, n, m], the group of bases of a number: upper, then lower halves of random words."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number)
    count, unit = AT_ONCE * math.prod(shape), 2.0**-15 / math.sqrt(size)
    counter = jnp.arange(-(-count // 2), dtype=jnp.uint32)
    words = threefry_2x32(jax.random.key_data(key), counter)
    halves = jnp.concatenate([words >> 16, words & 0xFFFF])[:count]
    drawn = halves.astype(jnp.int32).astype(jnp.float32) * unit + (0.5 - 2.0**15) * unit
    return drawn.reshape(AT_ONCE, *shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class NOLA(Method):
    """Adapter of rank `rank` from `bases` random matrices per factor.

    Raises:
      ValueError: rank or bases below 1.
    """

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    bases: int = 512

    def __post_init__(self) -> None:
        check_whole("NOLA.rank", self.rank)
        check_whole("NOLA.bases", self.bases)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """alpha, beta [k] = 0; frozen a0 [d_in, r], cols [d_out], seed [2, 2], scale []."""
        start, left, right = jax.random.split(key, 3)
        bound, dtype = 1 / math.sqrt(site.d_in), site.param_dtype
        seed = jnp.stack([jax.random.bits(k, (2,), jnp.uint32) for k in (left, right)])
        frozen = {
            "a0": jax.random.uniform(start, (site.d_in, self.rank), dtype, -bound, bound),
            "cols": jnp.arange(site.d_out, dtype=jnp.int32),
            "seed": seed,
            "scale": jnp.asarray(self.alpha / self.rank, jnp.float32),
        }
        return {name: jnp.zeros(self.bases, dtype) for name in ("alpha", "beta")}, frozen

    def factors(self, p: Arrays) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
        """u [d_in, r] = s A, v [r, d_out] = B."""
        a0, shape = p["a0"], (self.rank, len(p["cols"]))
        a = a0 + mixture(p["alpha"], p["seed"][0], (a0.shape[0], self.rank))
        return a * p["scale"], mixture(p["beta"], p["seed"][1], shape)


SYSTEM = System(
    name="NOLA",
    paper="Koohpayegani 2023, 2310.02556",
    symbol="NOLA",
    evidence="gradients against stored bases; the compiled step holds a few bases at a time",
    rows=(11,),
    claim="nola",
    examples=(NOLA(rank=2, alpha=3.0, bases=11),),
)
