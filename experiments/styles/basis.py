r"""A common basis: adapters with trained A and B as adapters that differ in B alone.

.. math::
    \sum_i \Delta_i \Delta_i^\top = Q \Lambda Q^\top, \qquad
    \Delta_i = s A_i B_i \approx Q_R\, (Q_R^\top \Delta_i) = Q_R B'_i

Symbols: i seen adapters, :math:`Q_R` the R eigenvectors of the largest eigenvalues, per site and
layer, [d_in, R]. No :math:`\Delta` is formed: both sides need products with r columns alone. In
this form a delta is linear in what differs, so that sums of adapters are sums of deltas, there is
no gauge, and a generator writes B' alone. What is lost is measured: the share of the energy that is
kept, and the loss of a style's own adapter after projection.

Original to jlora.
Deviates: nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jlora as jl
from jlora import numerics
from jlora.numerics import matmul


@functools.partial(jax.jit, static_argnums=2)
def common(
    a: Float[Array, "n d_in r"], b: Float[Array, "n r d_out"], rank: int
) -> tuple[Float[Array, "d_in R"], Float[Array, ""]]:
    """The basis of one site.

    Args:
      a: factors of n adapters.
      b: the other factors, scales folded in.
      rank: R.

    Returns:
      Q_R, and the share of the energy of all deltas that it keeps.
    """
    core = matmul(b, b.swapaxes(1, 2))  # [n, r, r]
    total = matmul(matmul(a, core), a.swapaxes(1, 2)).sum(0)
    values, vectors = numerics.eigh(total)
    kept = values[-rank:]
    size = jnp.maximum(values.sum(), jnp.finfo(values.dtype).tiny)
    return vectors[:, ::-1][:, :rank], kept.sum() / size


def fit(bank: jl.Adapter, template: jl.Adapter) -> tuple[jl.Adapter, dict[str, Any]]:
    """The template of adapters in the basis of a bank.

    Args:
      bank: n adapters of LoRA, whose A and B are trained.
      template: an adapter of the same sites whose A is frozen; its rank is R.

    Returns:
      The template with the basis as its A, and the share of the energy kept, path -> [*stack].

    Raises:
      ValueError: a rank above the width of a site.
    """
    frozen, shares = {}, {}
    for path, leaves in template.frozen.items():
        rank, width = leaves["a"].shape[-1], leaves["a"].shape[-2]
        if rank > width:
            raise ValueError(f"basis: got {rank}, expected at most {width}, the inputs of {path}")
        own = bank.trainable[path]
        scaled = own["b"] * bank.frozen[path]["scale"][..., None, None]
        run = functools.partial(common, rank=rank)
        for _ in range(own["a"].ndim - 3):
            run = jax.vmap(run, in_axes=(1, 1))
        a, share = run(own["a"], scaled)
        frozen[path] = {**leaves, "a": a}
        shares[path] = share
    return template.replace(frozen=frozen), shares


@jax.jit
def project(template: jl.Adapter, adapter: jl.Adapter) -> jl.Adapter:
    """An adapter in the common basis.

    Args:
      template: of `fit`.
      adapter: of the bank's kind.

    Returns:
      The nearest adapter of the template's kind; for a bank use `jax.vmap`.
    """
    out = {}
    for path, leaves in template.frozen.items():
        own = adapter.trainable[path]
        scale = adapter.frozen[path]["scale"] / leaves["scale"]
        inner = matmul(leaves["a"].swapaxes(-1, -2), own["a"])
        out[path] = {"b": matmul(inner, own["b"]) * scale[..., None, None]}
    return template.replace(trainable=out)
