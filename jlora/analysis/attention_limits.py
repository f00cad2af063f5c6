r"""Computational limits of LoRA: when the gradient of attention takes near-linear time.

===================  ==========================================================================
q, k, v              queries X_Q (W_Q + s A B), keys and values of one head, [n, d]; n is the
                     length of the input
β                    scale of the logits, into which the paper puts its :math:`1 / \sqrt d`
f                    attention, rows of :math:`\operatorname{softmax}(\beta q k^T)`, [n, n]
c                    gradient of the loss by the output f v, [n, d]; f v - Y of the squared loss
:math:`\phi`         the monomials up to degree m, :math:`\phi(x) \cdot \phi(y) =
                     \sum_{g \le m} (x \cdot y)^g / g!`
===================  ==========================================================================

.. math::
    p = f \odot (c v^T) - \operatorname{diag}(t) f, \quad t_j = f_j \cdot (c v^T)_j, \qquad
    \nabla_q = \beta\, p\, k, \quad \nabla_A = s\, X_Q^T \nabla_q B^T, \quad
    \nabla_B = s\, A^T X_Q^T \nabla_q

Each factor of this chain is of low rank as soon as :math:`\exp` of the logits is: with
:math:`\exp(\beta q_j k_i) \approx \phi(\sqrt\beta q_j) \cdot \phi(\sqrt\beta k_i)` no array of
[n, n] is formed, and the time is linear in n. The paper shows that this reaches an error of
1 / poly(n) where the largest entries of q and k are :math:`o(\sqrt{\log n})`, and that no algorithm
of time :math:`n^{2 - \epsilon}` exists (if SETH holds) where they grow slightly faster.
`bounds` gives these entries; they are an asymptotic condition, which no single n fulfils or breaks.

Reference: Hu et al. 2024, arXiv:2406.03136 (theorems 3.1, 4.1; the norms are of entries).
Deviates: Taylor's polynomial of a fixed degree stands for the one of the smallest degree of an
    error; c is any gradient, not that of the squared loss alone. Not causal, as in the paper.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora import numerics
from jlora.system import System

MOST = 20_000  # features of a row


class Bounds(NamedTuple):
    """The largest entries that the theorems speak of, by absolute value."""

    queries: Array  # [], of X_Q (W_Q + s A B)
    keys: Array  # [], of X_K W_K
    delta: Array  # [], of s X_Q A B, the part that is trained
    root: Array  # [], the square root of log n, that they are compared with


class Approximate(NamedTuple):
    """Attention by features, without an array of [n, n]."""

    output: Array  # [n, d_v], f v
    queries: Array  # [n, d], the gradient by q for the given c


def bounds(
    x: Float[Array, "n d_in"],
    y: Float[Array, "m d_in"],
    w_q: Float[Array, "d_in d"],
    w_k: Float[Array, "d_in d"],
    a: Float[Array, "d_in r"],
    b: Float[Array, "r d"],
    scale: float | Float[Array, ""],
) -> Bounds:
    """The norms of theorems 3.1 and 4.1, for LoRA on the queries of one head.

    Args:
      x: inputs of the queries, as a tap sees them.
      y: inputs of the keys; x itself in self-attention.
      w_q: kernel of the queries, frozen.
      w_k: kernel of the keys.
      a: A.
      b: B.
      scale: s, alpha / rank.

    Returns:
      Four numbers; compare them over several n, not with one another at one n.
    """
    delta = scale * numerics.matmul(numerics.matmul(x, a), b)
    queries = numerics.matmul(x, w_q) + delta
    largest = [jnp.max(jnp.abs(t)) for t in (queries, numerics.matmul(y, w_k), delta)]
    return Bounds(*largest, jnp.sqrt(jnp.log(jnp.asarray(len(x), jnp.float32))))


def query_gradient(
    q: Float[Array, "n d"],
    k: Float[Array, "m d"],
    v: Float[Array, "m d_v"],
    c: Float[Array, "n d_v"],
    beta: float = 1.0,
) -> Float[Array, "n d"]:
    """The chain of the gradient by the queries, exact, with arrays of [n, m].

    Args:
      q: queries.
      k: keys.
      v: values.
      c: gradient of the loss by the output.
      beta: scale of the logits; 1: it is in q already.

    Returns:
      The gradient by q.
    """
    f = jax.nn.softmax(beta * numerics.einsum("nd,md->nm", q, k), axis=-1)
    inner = numerics.einsum("ne,me->nm", c, v)
    p = f * inner - jnp.sum(f * inner, axis=-1, keepdims=True) * f
    return beta * numerics.matmul(p, k)


def factor_gradients(
    x: Float[Array, "n d_in"],
    queries: Float[Array, "n d"],
    a: Float[Array, "d_in r"],
    b: Float[Array, "r d"],
    scale: float | Float[Array, ""],
) -> tuple[Float[Array, "d_in r"], Float[Array, "r d"]]:
    """The gradients by A and B from that by the queries, without the one by the weight.

    Args:
      x: inputs of the queries.
      queries: gradient by the queries, exact or approximate.
      a: A.
      b: B.
      scale: s, alpha / rank.

    Returns:
      (by A, by B).
    """
    thin = numerics.einsum("nd,rd->nr", queries, b)
    by_a = scale * numerics.einsum("ni,nr->ir", x, thin)
    by_b = scale * numerics.einsum("nr,nd->rd", numerics.matmul(x, a), queries)
    return by_a, by_b


def feature_count(width: int, degree: int) -> int:
    """How many monomials of `width` variables there are up to a degree.

    Args:
      width: d.
      degree: m.

    Returns:
      (d + m)! / (d! m!).
    """
    return math.comb(width + degree, degree)


def features(x: Float[Array, "n d"], degree: int) -> Float[Array, "n count"]:
    """The monomials whose inner products are Taylor's polynomial of exp.

    Args:
      x: rows, each to be multiplied by the square root of beta before.
      degree: m; the number of features grows as d^m / m!.

    Returns:
      phi(x) by row, `feature_count` of them, ordered by degree.

    Raises:
      ValueError: a negative degree, or more than 20,000 features.
    """
    width = x.shape[-1]
    if degree < 0 or feature_count(width, degree) > MOST:
        count = feature_count(width, max(degree, 0))
        raise ValueError(f"degree: got {degree}, {count:,} features of width {width}, expected a "
                         f"degree of 0 or more and at most {MOST:,} features")  # fmt: skip
    parts = [jnp.ones((len(x), 1), x.dtype)]
    for g in range(1, degree + 1):
        chosen = list(itertools.combinations_with_replacement(range(width), g))
        ways = [math.prod(math.factorial(c) for c in np.unique(i, return_counts=True)[1])
                for i in chosen]  # fmt: skip
        weight = jnp.asarray(1 / np.sqrt(np.asarray(ways, np.float64)), x.dtype)
        parts.append(jnp.prod(x[:, np.asarray(chosen)], axis=-1) * weight[None])
    return jnp.concatenate(parts, axis=-1)


def approximate(
    q: Float[Array, "n d"],
    k: Float[Array, "m d"],
    v: Float[Array, "m d_v"],
    c: Float[Array, "n d_v"] | None = None,
    beta: float = 1.0,
    degree: int = 2,
) -> Approximate:
    """Output of attention and gradient by the queries, in time linear in n and m.

    Args:
      q: queries.
      k: keys.
      v: values.
      c: gradient of the loss by the output; None: the output itself, as of the squared loss with
        Y = 0.
      beta: scale of the logits, positive.
      degree: of the polynomial; an odd one can make a sum of weights negative or zero, 2 cannot.

    Returns:
      Both, wrong by what the polynomial lacks.

    Raises:
      ValueError: as `features`.
    """
    left, right = (features(math.sqrt(beta) * x, degree) for x in (q, k))
    total = numerics.einsum("nf,f->n", left, jnp.sum(right, axis=0))
    left = left / total[:, None]
    values = numerics.einsum("mf,me->fe", right, v)
    output = numerics.matmul(left, values)
    c = output if c is None else c
    keys = numerics.einsum("mf,md->fd", right, k)
    both = numerics.einsum("mf,me,md->fed", right, v, k)
    first = numerics.einsum("nf,ne,fed->nd", left, c, both)
    t = jnp.sum(output * c, axis=-1, keepdims=True)  # the rows of f times those of c v^T
    return Approximate(output, beta * (first - t * numerics.matmul(left, keys)))


SYSTEM = System(
    name="Computational Limits",
    paper="Hu 2024, 2406.03136",
    symbol="approximate",
    kind="analysis",
    evidence="the chain is jax.grad to 1e-5; features by numpy; no array of n x n in the program",
    rows=(43,),
    claim="attention_limits",
)
