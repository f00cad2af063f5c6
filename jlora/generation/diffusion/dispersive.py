r"""Dispersive loss: repel the activations of a batch from one another, without positive pairs.

With :math:`z_i` the flattened activations of example i in :math:`R^d`, B examples, and M the set of
pairs (i, j) that count:

.. math::
    \text{infonce\_l2}:\quad & \log \frac{1}{|M|}\sum_{M} e^{-D_{ij}/\tau},
        \qquad D_{ij} = \|z_i - z_j\|^2 / d \\
    \text{infonce\_cos}:\quad & \log \frac{1}{|M|}\sum_{M}
        e^{\langle z_i, z_j\rangle / (\|z_i\|\|z_j\| \tau)} \\
    \text{hinge}:\quad & \frac{1}{|M|}\sum_{M} \max(0, \varepsilon - D_{ij})^2 \\
    \text{covariance}:\quad & \sum_{m \ne n} C_{mn}^2,
        \qquad C = \mathrm{cov}(z_i / \|z_i\|)

M is all B x B pairs (``all``), those of different conditions (``other_condition``) or of the same
(``same_condition``); the B pairs (i, i) always count, so M is never empty and the lowest value of
infonce_l2 with ``all`` is -log B.

Symbols: z -> ``hidden``, :math:`\tau` -> ``temperature``, :math:`\varepsilon` -> ``margin``.
Shapes: hidden [B, ...] float32, groups [B] int (condition of each example); loss scalar.
Raises: ValueError for unknown names, a mask with ``covariance``, or a mask without groups.
Paper: Wang and He 2025, arXiv 2506.09027 (default temperature 0.5, weight 0.5, block depth // 4).
Source: paper and official code (the division by d is in the code only: without it the exponentials
of far pairs vanish); the masks and the sample covariance (B - 1) are original to jlora.
Deviates: activations are centred before distances and covariances are taken through the B x B Gram
matrix: the same values, no square root, no d x d matrix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora import numerics
from jlora.system import System

LOSSES = ("infonce_l2", "infonce_cos", "hinge", "covariance", "none")
MASKS = ("all", "other_condition", "same_condition")


def pair_mask(mask: str, count: int, groups: Int[Array, "B"] | None = None) -> Bool[Array, "B B"]:
    """Which pairs count; the diagonal always does.

    Args:
      mask: one of `MASKS`.
      count: B.
      groups: condition of each example; not needed for "all".

    Returns:
      True for the pairs of M.

    Raises:
      ValueError: an unknown mask, or no groups where they are needed.
    """
    if mask not in MASKS:
        raise ValueError(f"dispersive mask: got {mask!r}, expected one of {MASKS}")
    if mask == "all":
        return jnp.ones((count, count), bool)
    if groups is None:
        raise ValueError(f"dispersive mask {mask!r}: got no groups, expected an int array [B]")
    same = groups[:, None] == groups[None, :]
    return same if mask == "same_condition" else ~same | jnp.eye(count, dtype=bool)


def squared_distances(z: Float[Array, "B d"]) -> Float[Array, "B B"]:
    """D_ij = |z_i - z_j|^2 / d.

    Args:
      z: activations.

    Returns:
      [B, B].
    """
    z = z - jnp.mean(z, axis=0, keepdims=True)  # distances stay, cancellation shrinks
    square = jnp.sum(z * z, axis=1)
    gram = jnp.matmul(z, z.T, precision="highest")
    return jnp.maximum(square[:, None] + square[None, :] - 2.0 * gram, 0.0) / z.shape[1]


def unit(z: Float[Array, "B d"]) -> Float[Array, "B d"]:
    """Rows at length one.

    Args:
      z: activations.

    Returns:
      The same shape; a zero row stays zero.
    """
    square = jnp.sum(z * z, axis=1, keepdims=True)
    return z * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def log_mean_exp(logits: Float[Array, "B B"], mask: Bool[Array, "B B"]) -> Float[Array, ""]:
    """Log of the mean of exp over some pairs.

    Args:
      logits: one per pair.
      mask: the pairs.

    Returns:
      scalar.
    """
    return jax.nn.logsumexp(logits, where=mask) - jnp.log(jnp.sum(mask, dtype=logits.dtype))


def centred_gram(z: Float[Array, "B d"]) -> Float[Array, "B B"]:
    """Gram matrix of the centred rows.

    Args:
      z: activations.

    Returns:
      [B, B]; its eigenvalues / (B - 1) are those of the covariance.
    """
    z = z - jnp.mean(z, axis=0, keepdims=True)
    return jnp.matmul(z, z.T, precision="highest")


def dispersive_loss(
    name: str,
    hidden: Float[Array, "B ..."],
    groups: Int[Array, "B"] | None = None,
    *,
    mask: str = "all",
    temperature: float = 0.5,
    margin: float = 1.0,
) -> Float[Array, ""]:
    """The dispersive loss of one batch of activations.

    Args:
      name: one of `LOSSES`; "none" is 0.
      hidden: activations, flattened per example.
      groups: condition of each example; not needed for mask "all".
      mask: one of `MASKS`; "covariance" takes "all" alone.
      temperature: tau, the paper's default.
      margin: epsilon of "hinge".

    Returns:
      scalar.

    Raises:
      ValueError: an unknown name or mask, a mask with "covariance", or a mask without groups.
    """
    if name not in LOSSES:
        raise ValueError(f"dispersive loss: got {name!r}, expected one of {LOSSES}")
    count = hidden.shape[0]
    pairs = pair_mask(mask, count, groups)
    z = hidden.reshape(count, -1)
    if name == "none":
        return jnp.zeros((), z.dtype)
    if name == "infonce_l2":
        return log_mean_exp(-squared_distances(z) / temperature, pairs)
    if name == "infonce_cos":
        z = unit(z)
        return log_mean_exp(jnp.matmul(z, z.T, precision="highest") / temperature, pairs)
    if name == "hinge":
        gap = jnp.maximum(margin - squared_distances(z), 0.0) ** 2
        return jnp.sum(gap, where=pairs) / jnp.sum(pairs, dtype=z.dtype)
    if mask != "all":
        raise ValueError(f"dispersive covariance: got mask {mask!r}, expected 'all'")
    z = unit(z)
    gram = centred_gram(z)
    variance = jnp.var(z, axis=0, ddof=1)
    return jnp.sum(gram**2) / (count - 1) ** 2 - jnp.sum(variance**2)


def effective_rank(hidden: Float[Array, "B ..."]) -> Float[Array, ""]:
    """exp(entropy) of the normalised covariance spectrum: how many directions a batch uses.

    Roy and Vetterli 2007.

    Args:
      hidden: activations, flattened per example.

    Returns:
      1 for a line, up to B - 1; 0/0 (nan) where all rows are equal.
    """
    gram = centred_gram(hidden.reshape(hidden.shape[0], -1))
    share = jnp.maximum(numerics.eigvalsh(gram), 0.0) / jnp.trace(gram)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))


SYSTEM = System(
    name="Dispersive loss",
    paper="Wang 2025, 2506.09027",
    symbol="dispersive_loss",
    evidence="formulas by numpy; landmarks; mutation check",
    rows=(2,),
    claim="dispersive",
)
