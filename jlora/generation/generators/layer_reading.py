r"""How the layers of a base are read, and how scores of its features become factors of an adapter.

==========  ======================================================================================
f_k         what enters the adapted matrix of layer k, its mean over the tokens of a text, [m]
mu_k, s_k   mean of f_k over training texts, and root mean square of :math:`\|f_k - \mu_k\|`
R           ridge regression from the last layer's f to the embedding of the text, [m, d]
x           the text as a discriminant sees it, [D], D = d + L m, with the share omega
J_k         derivative of the embedding by a constant added to all tokens of layer k's output,
            before its norm; mean over training texts, [d, d]
h_c         class vector of the frozen head, [d]
Q           orthonormal columns [C, C - 1] that sum to zero
==========  ======================================================================================

.. math:: x = [R^T \hat f_L, \omega \hat f_1, ..., \omega \hat f_L], \qquad
    \hat f_k = (f_k - \mu_k) / s_k

Scores that are linear in x are linear in the features. What the base says by itself is taken off as
far as it is linear too, with the mean :math:`\bar e` and the length l of embeddings:

.. math:: W^T (x - \bar x) - H (\bar e + l\, R^T \hat f_L) = \sum_k (U_k^T f_k + o_k)

Layer k adds its own part to its output, along directions that the layers above turn into the class
vectors, :math:`V_k = H (J_k J_k^T + \epsilon I)^{-1} J_k`:

.. math:: a_k = \big[\, U_k Q,\; \mu_k / \|\mu_k\|^2 \big], \qquad
    b_k = \begin{bmatrix} Q^T V_k \\ (Q Q^T o_k)^T V_k \end{bmatrix},

an ordinary LoRA of rank C in each layer. The last column of a stands for a constant, because
:math:`\mu^T f / \|\mu\|^2 \approx 1`.

Reference: original to jlora.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora import numerics
from jlora.generation.generators.discriminant import contrasts

READ_RIDGE = 1e-3  # of R, over the mean variance of a feature
TURN_RIDGE = 1e-2  # epsilon over the mean eigenvalue of J J^T


class Reading(NamedTuple):
    """How a base's layers are read and written."""

    mean: Float[Array, "L m"]  # mu
    size: Float[Array, "L"]  # s
    readout: Float[Array, "m d"]  # R
    middle: Float[Array, "d"]  # mean of the embedding
    length: Float[Array, ""]  # root mean square of the embedding less its mean
    turn: Float[Array, "L d d"]  # (J J^T + epsilon I)^-1 J, so that V = H turn


def reading(
    features: Float[np.ndarray, "N L m"],
    embeddings: Float[np.ndarray, "N d"],
    jacobians: Float[np.ndarray, "L d d"],
) -> Reading:
    """How to read and write the layers of a base, from training texts.

    Args:
      features: f of each text.
      embeddings: what the base says of each.
      jacobians: J of each layer.

    Returns:
      The reading, from sums in float64.

    Raises:
      ValueError: numbers that are not finite, or features that are the same for every text.
    """
    f, e, j = (np.asarray(t, np.float64) for t in (features, embeddings, jacobians))
    if not all(np.isfinite(t).all() for t in (f, e, j)):
        raise ValueError("features: got NaN or infinity, expected finite numbers")
    mean = f.mean(0)
    size = np.sqrt(np.sum((f - mean) ** 2, axis=2).mean(0))
    middle = e.mean(0)
    e = e - middle
    length = np.sqrt(np.sum(e**2, axis=1).mean())
    if not (size.all() and length):
        raise ValueError("features: got the same for every text, expected texts that differ")
    last = (f[:, -1] - mean[-1]) / size[-1]
    gram = last.T @ last
    ridge = READ_RIDGE * np.trace(gram) / len(gram)
    readout = np.linalg.solve(gram + ridge * np.eye(len(gram)), last.T @ (e / length))
    square = j @ np.swapaxes(j, 1, 2)
    small = TURN_RIDGE * np.trace(square, axis1=1, axis2=2) / square.shape[-1]
    turn = np.linalg.solve(square + small[:, None, None] * np.eye(square.shape[-1]), j)
    return Reading(
        *(jnp.asarray(t, jnp.float32) for t in (mean, size, readout, middle, length, turn))
    )


def seen(
    read: Reading, features: Float[Array, "n L m"], share: float
) -> tuple[Float[Array, "n d"], Float[Array, "n D"]]:
    """Texts as a discriminant sees them.

    Args:
      read: of the base.
      features: f of each text.
      share: omega.

    Returns:
      (the embedding as the last layer's features say it, in lengths l, without its mean; x).
    """
    standard = (features - read.mean[None]) / read.size[None, :, None]
    embedding = numerics.matmul(standard[:, -1], read.readout)
    own = share * standard.reshape(len(features), -1)
    return embedding, jnp.concatenate([embedding, own], axis=1)


def factors(
    read: Reading,
    share: float,
    w: Float[Array, "D C"],
    centre: Float[Array, "D"],
    heads: Float[Array, "C d"],
) -> tuple[Float[Array, "L m C"], Float[Array, "L C d"]]:
    """The scores w^T (x - centre) in the place of the base's own, as factors of all layers.

    Args:
      read: of the base.
      share: omega.
      w: W, in lengths of a class vector.
      centre: x-bar.
      heads: class vectors.

    Returns:
      (a, b), scale of an adapter not included.
    """
    (layers, m), d = read.mean.shape, read.readout.shape[1]
    q = jnp.asarray(contrasts(len(heads)), w.dtype)
    own = w[d:].reshape(layers, m, -1)
    word = w[:d] - read.length * heads.T
    u = share * own / read.size[:, None, None]
    u = u.at[-1].add(numerics.matmul(read.readout, word) / read.size[-1])
    offset = -jnp.sum(centre[d:].reshape(layers, m, 1) * own, axis=1)  # [L, C]
    level = numerics.matmul(centre[None, :d], w[:d]) + numerics.matmul(read.middle[None], heads.T)
    offset = offset.at[-1].add(-level[0]) - jnp.sum(read.mean[:, :, None] * u, axis=1)
    constant = read.mean / jnp.sum(read.mean**2, axis=1, keepdims=True)
    wide = jnp.broadcast_to(q, (layers, *q.shape))
    a = jnp.concatenate([numerics.matmul(u, wide), constant[:, :, None]], axis=2)
    along = numerics.matmul(jnp.broadcast_to(heads, (layers, *heads.shape)), read.turn)  # V
    rows = jnp.concatenate(
        [jnp.swapaxes(wide, 1, 2), numerics.matmul(numerics.matmul(offset, q), q.T)[:, None]],
        axis=1,
    )
    return a, numerics.matmul(rows, along)
