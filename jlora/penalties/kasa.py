r"""KaSA's penalty: small singular values, and factors near orthonormal.

==========  ===========================================================
A, d, B     `a` [d_in, r], `d` [r], `b` [r, d_out] of `jlora.methods.KaSA`
K           matrices that are adapted; a stack of layers counts each
beta        weight of the singular values
gamma       weight of the factors
==========  ===========================================================

.. math::
    \Omega = \frac1K \sum \left[ \beta \lVert d \rVert^2
    + \gamma \left( \lVert A^T A - I \rVert_F + \lVert B B^T - I \rVert_F \right) \right]

so that d is what singular values are: it says how much each direction matters to the task.

Paper: Wang et al. 2024, arXiv:2412.06071.
Source: paper; weights as its code.
Deviates: Gram matrices of r x r, as the paper has them; the official code takes those of
d_in x d_in and d_out x d_out, which no thin factor can make the identity.
"""

import jax
import jax.numpy as jnp

from jlora.contracts.penalty import Penalty
from jlora.core.adapter import Adapter
from jlora.core.site import widened
from jlora.methods.low_rank.kasa import KaSA


def kasa(adapter: Adapter, beta: float = 1e-4, gamma: float = 1e-3) -> jax.Array:
    """The mean of the penalties of all matrices that KaSA adapts.

    Args:
      adapter: of any methods; sites of others than KaSA do not count. Stacked layers do, each.
      beta: weight of the squared singular values.
      gamma: weight of how far the factors are from orthonormal.

    Returns:
      [], not negative, of the dtype of the factors, at least float32; zero where none counts.

    Raises:
      ValueError: a weight that is negative.
    """
    for name, weight in (("beta", beta), ("gamma", gamma)):
        if not weight >= 0:
            raise ValueError(f"{name}: got {weight}, expected a number >= 0")
    terms, count = [], 0
    for site, method in adapter.sites:
        if not isinstance(method, KaSA):
            continue
        p = widened({k: adapter.trainable[site.path][k] for k in ("a", "d", "b")})
        apart = _distance(p["a"].mT @ p["a"]) + _distance(p["b"] @ p["b"].mT)
        terms.append(beta * jnp.sum(p["d"] ** 2) + gamma * jnp.sum(apart))
        count += p["d"].size // p["d"].shape[-1]
    return sum(terms[1:], terms[0]) / count if terms else jnp.zeros((), jnp.float32)


def _distance(gram: jax.Array) -> jax.Array:
    """[...], the Frobenius norm of gram [..., r, r] - I; its gradient where it is zero is zero."""
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    square = jnp.sum((gram - eye) ** 2, axis=(-2, -1))
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)


def at_zero(adapter: Adapter) -> Adapter:
    """An adapter whose penalty is zero: Q of the QR decomposition of both factors, d = 0.

    Args:
      adapter: of KaSA sites.

    Returns:
      The adapter.
    """
    out = dict(adapter.trainable)
    for site, _ in adapter.sites:
        p = out[site.path]
        a, b = jnp.linalg.qr(p["a"])[0], jnp.linalg.qr(p["b"].mT)[0].mT
        out[site.path] = {"a": a, "d": jnp.zeros_like(p["d"]), "b": b}
    return adapter.replace(trainable=out)


SYSTEM = Penalty(
    name="KaSA penalty",
    paper="Wang 2024, 2412.06071",
    symbol="kasa",
    evidence="value by numpy, zero for orthonormal factors without singular values",
    kind="component",
    examples=(KaSA(rank=2),),
    penalty=lambda adapter, params, ctx: kasa(adapter),
    zero=at_zero,
)
