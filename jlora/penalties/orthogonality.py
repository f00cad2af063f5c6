r"""AdaLoRA's penalty: both factors of a delta in the form of an SVD are kept near orthogonal.

=========  ===========================================================
A, B       `a` [d_in, r], `b` [r, d_out] of `jlora.methods.AdaLoRA`
Omega      the penalty of one matrix
=========  ===========================================================

.. math:: \Omega = \lVert A^T A - I \rVert_F^2 + \lVert B B^T - I \rVert_F^2

so that its `e`, in the place of singular values, tells which directions matter.

Paper: Zhang et al. 2023, arXiv:2303.10512.
Source: paper; the mean over all factors, as PEFT 0.21.
Deviates: squared norms, as the paper has them; PEFT sums norms that are not squared.
"""

import jax
import jax.numpy as jnp

from jlora.contracts.penalty import Penalty
from jlora.core.adapter import Adapter
from jlora.core.site import widened
from jlora.methods.low_rank.adalora import AdaLoRA


def orthogonality(adapter: Adapter) -> jax.Array:
    """The mean of the penalties of all factors of an adapter.

    Args:
      adapter: of any methods; sites of others than AdaLoRA do not count. Stacked layers do, each.

    Returns:
      [], not negative, of the dtype of the factors, at least float32; zero where none counts.
    """
    terms, count = [], 0
    for site, method in adapter.sites:
        if not isinstance(method, AdaLoRA):
            continue
        p = widened({k: adapter.trainable[site.path][k] for k in ("a", "b")})
        for gram in (p["a"].mT @ p["a"], p["b"] @ p["b"].mT):
            eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
            terms.append(jnp.sum((gram - eye) ** 2))
            count += gram.size // gram.shape[-1] ** 2
    return sum(terms[1:], terms[0]) / count if terms else jnp.zeros((), jnp.float32)


def orthogonal(adapter: Adapter) -> Adapter:
    """An adapter whose penalty is zero: Q of the QR decomposition of every factor.

    Args:
      adapter: of AdaLoRA sites.

    Returns:
      The adapter with orthogonal factors.
    """
    out = dict(adapter.trainable)
    for site, _ in adapter.sites:
        p = out[site.path]
        a, b = jnp.linalg.qr(p["a"])[0], jnp.linalg.qr(p["b"].mT)[0].mT
        out[site.path] = {**p, "a": a, "b": b}
    return adapter.replace(trainable=out)


SYSTEM = Penalty(
    name="AdaLoRA penalty",
    paper="Zhang 2023, 2303.10512",
    symbol="orthogonality",
    evidence="value by numpy, zero for orthogonal factors",
    kind="component",
    examples=(AdaLoRA(rank=2),),
    penalty=lambda adapter, params, ctx: orthogonality(adapter),
    zero=orthogonal,
)
