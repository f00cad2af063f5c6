r"""Projection of a true adapter on the affine span of the training adapters.

How much of a held-out task any interpolating generator could reach in delta space: project the
held-out task's own trained delta and measure the accuracy of the projection. It is no upper bound
of accuracy (an average also removes training noise), only of fit.

Symbols: :math:`G` is ``gram`` [n, n], :math:`c_m` is ``cross`` [m, n], :math:`H = I - 11^T/n`.

.. math:: w_m = \tfrac1n 1 + (HGH)_k^{+} H (c_m - \tfrac1n G 1), \qquad
    \mathrm{residual}_m = \frac{\|\Delta_m - \sum_n w_{mn}\Delta_n\|}{\|\Delta_m\|},

with :math:`(\cdot)_k^+` the pseudo-inverse on the k leading eigenvectors. Rows of ``w`` sum to one.

Paper: none (least squares).
Deviates: nothing to deviate from.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import numerics
from jlora.generation.baselines import soup
from jlora.generation.baselines.soup import matmul
from jlora.system import System


def affine_weights(
    gram: Float[Array, "n n"],
    cross: Float[Array, "m n"],
    *,
    components: int | None = None,
    tolerance: float = 1e-5,
) -> Float[Array, "m n"]:
    """Weights of the closest point of the training adapters' affine span.

    Args:
      gram: [n, n] inner products of the training deltas.
      cross: [m, n] inner products of the targets with the training deltas.
      components: keep only this many leading principal directions (static); None keeps all.
      tolerance: directions below ``tolerance`` times the largest eigenvalue are dropped (they
        are rounding; copies of an adapter span nothing).

    Returns:
      [m, n] for ``soup.combine``.

    Raises:
      ValueError: shapes that disagree, or ``components`` outside 0..n-1.
    """
    n = gram.shape[0]
    if gram.shape != (n, n) or cross.ndim != 2 or cross.shape[1] != n:
        raise ValueError(f"span: gram {gram.shape}, cross {cross.shape}; expected [n, n], [m, n]")
    keep = n - 1 if components is None else components
    if not 0 <= keep <= n - 1:
        raise ValueError(f"span: components {components}, expected 0..{n - 1}")
    centre = jnp.eye(n, dtype=gram.dtype) - 1.0 / n
    values, vectors = numerics.eigh(matmul(matmul(centre, gram), centre))  # ascending
    leading = jnp.arange(n) >= n - keep
    used = leading & (values > tolerance * values[-1])
    inverse = jnp.where(used, 1 / jnp.where(used, values, 1), 0)
    basis = matmul(centre, vectors)
    target = cross - jnp.mean(gram, axis=1)[None, :]
    return 1.0 / n + matmul(matmul(target, basis) * inverse[None, :], basis.T)


def residual(
    weights: Float[Array, "m n"],
    gram: Float[Array, "n n"],
    cross: Float[Array, "m n"],
    squared_norms: Float[Array, "m"],
) -> Float[Array, "m"]:
    """Relative distance of the targets to their projections.

    In float32 it cannot resolve below about 1e-3 (the square root of rounding).

    Args:
      weights: of `affine_weights`.
      gram: inner products of the training deltas.
      cross: inner products of the targets with the training deltas.
      squared_norms: of the targets.

    Returns:
      0 inside the span, at most about 1.
    """
    return jnp.sqrt(soup.squared_error(weights, gram, cross, squared_norms) / squared_norms)


SYSTEM = System(
    name="Span projection",
    paper="none (jlora)",
    symbol="affine_weights",
    evidence="against least squares; members are reached",
    kind="component",
)
