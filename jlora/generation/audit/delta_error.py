r"""How far the deltas of two sets of tokens are apart, from the factors alone.

With E = \hat a \hat b - a b = (\hat a - a) \hat b + a (\hat b - b), written as one product U V of
inner size 2 r,

.. math:: U = [\hat a - a,\ a], \quad V = [\hat b;\ \hat b - b], \qquad
    \|U V\|_F^2 = \mathrm{tr}(U^T U\, V V^T).

The textbook form |ab|^2 - 2 <ab, \hat a \hat b> + |\hat a \hat b|^2 cancels in float32 near the
target; in U V each summand is itself small, so the error is relative to itself. O((d_in+d_out) r^2)
and no [d_in, d_out] array.

Source: trace identity of low-rank products; the difference form is original to jlora.
Deviates: nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.generation.tokens import normalise
from jlora.generation.tokens.site_tokens import TokenSpec, factors
from jlora.types import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaView:
    """How normalised tokens become LoRA factors."""

    spec: TokenSpec = dataclasses.field(metadata={"static": True})  # layout of the tokens
    norm: normalise.Normaliser | None = None  # a global one; None: tokens are not normalised
    frozen: Tree = None  # path -> {"a": [*stack, d_in, r]} where A is not trained


class DeltaTerms(NamedTuple):
    """Squared Frobenius norms and inner product of each token."""

    error: Array  # [T] |D_hat - D|^2
    inner: Array  # [T] <D_hat, D>
    norm: Array  # [T] |D|^2
    norm_hat: Array  # [T] |D_hat|^2


def product_inner(
    u: Float[Array, "k m r"],
    v: Float[Array, "k r n"],
    p: Float[Array, "k m s"],
    q: Float[Array, "k s n"],
) -> Float[Array, "k"]:
    """<u v, p q>, without the products.

    Args:
      u: left factors.
      v: right factors.
      p: left factors of the other products, of any rank.
      q: right factors of the other products.

    Returns:
      Inner products.
    """
    left = jnp.einsum("kmr,kms->krs", u, p, precision="highest")
    right = jnp.einsum("krn,ksn->krs", v, q, precision="highest")
    return jnp.sum(left * right, axis=(1, 2))


def delta_terms(
    view: DeltaView | None, x_hat: Float[Array, "T D"], x: Float[Array, "T D"]
) -> DeltaTerms:
    """Terms of the error of x_hat against x.

    Args:
      view: how tokens become factors; None takes the tokens themselves for the deltas (right up
        to scale where a frozen A has orthonormal columns).
      x_hat: [T, D] normalised tokens.
      x: [T, D] normalised tokens.

    Returns:
      One number of each kind per token.

    Raises:
      ValueError: a view with a normaliser of mode "task" (it has no one inverse).
    """
    if view is None:
        pairs = ((x_hat - x,) * 2, (x_hat, x), (x, x), (x_hat, x_hat))
        return DeltaTerms(*(jnp.sum(p * q, axis=1) for p, q in pairs))
    if view.norm is not None:
        x_hat, x = normalise.invert(view.norm, x_hat), normalise.invert(view.norm, x)
    rows = []
    both = (factors(view.spec, t, view.frozen) for t in (x_hat, x))
    for (a_hat, b_hat), (a, b) in zip(*both, strict=True):
        u = jnp.concatenate([a_hat - a, a], axis=2)
        v = jnp.concatenate([b_hat, b_hat - b], axis=1)
        rows.append(
            DeltaTerms(
                product_inner(u, v, u, v),
                product_inner(a_hat, b_hat, a, b),
                product_inner(a, b, a, b),
                product_inner(a_hat, b_hat, a_hat, b_hat),
            )
        )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
