"""LiON-LoRA fusion: deltas are brought to one norm before they are added, linearly in the weights.

=========  ====================================================================
D_n        delta of adapter n, u_n v_n
w_n        its weight, the amplitude of its effect
x          inputs [T, d_in], or white noise where none are given
=========  ====================================================================

.. math:: n_n = \\|x D_n\\|_F, \\quad \\bar n = \\frac{\\sum_n |w_n| n_n}{\\sum_n |w_n|}, \\qquad
          D = \\sum_n w_n \\, \\frac{\\bar n}{n_n} \\, D_n

With white noise the norm is that of D_n itself. Norm consistency: no adapter drowns another one.
Orthogonality is what the paper observes, not enforces: adapters whose features are orthogonal, as
in shallow layers, can be added without interference. `overlap` measures it; `orthogonal=True`
enforces it, by the symmetric orthogonalisation nearest to the normalised deltas,

.. math:: D = \\sum_m \\Bigl(\\sum_n w_n \\bar n \\, (G^{-1/2})_{nm}\\Bigr) \\frac{D_m}{n_m},
          \\quad G_{nm} = \\cos(x D_n, x D_m),

after which the part of the result along direction n is w_n times the mean norm, whatever the other
weights: linear scale.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, N R], v [N R, d_out].

Paper: Zhang et al. 2025, arXiv:2507.05678.
Source: abstract and notes on the paper, which give no equations: all of this is reconstructed.
Deviates: `orthogonal` is not in the paper. Its token for the amplitude, inside the attention of a
video transformer, is not here. A zero delta adds nothing.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora import numerics
from jlora.algebra import LowRank
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat
from jlora.merging.signs import present
from jlora.numerics import einsum


def lion(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    inputs: Float[Array, "t d_in"] | None = None,
    orthogonal: bool = False,
    floor: float = 1e-4,
) -> LowRank:
    """The fusion of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N], amplitudes of any sign; 0 leaves an adapter out.
      inputs: [T, d_in], what norms are measured on; None: white noise, the norm of the delta.
      orthogonal: make the normalised deltas orthogonal first; False, as in the paper.
      floor: of the eigenvalues of G, where adapters are (nearly) parallel, > 0; 1e-4.

    Returns:
      u [d_in, N R], v [N R, d_out].

    Raises:
      ValueError: inputs of another shape.
    """
    there = present(weights).astype(bank.u.dtype)
    gram = features(bank, inputs) * there[:, None] * there[None, :]
    norms, scale = _norms(gram)
    size = jnp.abs(weights)
    total = jnp.sum(size)
    mean = jnp.sum(size * norms) / jnp.where(total > 0, total, jnp.ones_like(total))
    if not orthogonal:
        return concat(bank, weights * mean * scale)
    cosines = gram * scale[:, None] * scale[None, :]
    cosines = cosines + jnp.diag(jnp.where(norms > 0, 0.0, jnp.ones_like(norms)))
    values, vectors = numerics.eigh(cosines)
    root = vectors / jnp.sqrt(jnp.maximum(values, floor))[None, :]
    mixed = einsum("nk,mk->nm", root, vectors)
    return concat(bank, einsum("n,nm->m", weights * mean, mixed) * scale)


def lion_orthogonal(
    bank: LowRank,
    weights: Float[Array, "n"],
    *,
    inputs: Float[Array, "t d_in"] | None = None,
    floor: float = 1e-4,
) -> LowRank:
    """`lion` with the deltas made orthogonal.

    Args, Returns and Raises are those of `lion`.
    """
    return lion(bank, weights, orthogonal=True, inputs=inputs, floor=floor)


def overlap(bank: LowRank, inputs: Float[Array, "t d_in"] | None = None) -> Array:
    """Cosines between the features of the adapters of one site.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      inputs: what features are of; None: white noise.

    Returns:
      [N, N]; 0 for a zero delta.
    """
    gram = features(bank, inputs)
    _, scale = _norms(gram)
    return gram * scale[:, None] * scale[None, :]


def features(bank: LowRank, inputs: Float[Array, "t d_in"] | None = None) -> Array:
    """Inner products of the features x D_n.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      inputs: x; None: white noise, inner products of the deltas.

    Returns:
      [N, N].

    Raises:
      ValueError: inputs that are not [T, d_in].
    """
    u = bank.u
    if inputs is not None:
        if inputs.ndim != 2 or inputs.shape[1] != u.shape[1]:
            raise ValueError(f"inputs: got shape {inputs.shape}, expected (T, {u.shape[1]})")
        u = einsum("ti,nir->ntr", inputs.astype(u.dtype), u)
    left, right = (
        einsum("nir,mis->nmrs", u, u),
        einsum("nro,mso->nmrs", bank.v, bank.v),
    )
    return jnp.sum(left * right, axis=(-2, -1))


def _norms(gram: Array) -> tuple[Array, Array]:
    """(norms, their inverses) [N]; 0 and 0 for a zero delta."""
    squared = jnp.diagonal(gram)
    live = squared > 0
    norms = jnp.sqrt(jnp.where(live, squared, jnp.ones_like(squared)))
    return jnp.where(live, norms, 0.0), jnp.where(live, 1.0 / norms, 0.0)


SYSTEMS = (
    Merging(
        name="lion",
        paper="Zhang 2025, 2507.05678",
        symbol="lion",
        function=lion,
        evidence="norms and overlaps by numpy; a weak adapter is heard",
        rows=(50,),
        missing="the amplitude token and the static-camera adapter; a claim on video",
    ),
    Merging(
        name="lion_orthogonal",
        paper="Zhang 2025, 2507.05678",
        symbol="lion_orthogonal",
        function=lion_orthogonal,
        breaks={
            "idempotent": "equal adapters have no orthogonal frame",
        },
        evidence="frame by numpy; linear in each amplitude alone",
        rows=(50,),
        missing="a claim on video",
    ),
)
