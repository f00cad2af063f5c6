"""Products in full precision and factorisations: what every room computes with, once.

Products use the highest precision of the backend (TPUs and GPUs would otherwise round float32
operands). Factorisations go through `jlora.lapack`, which some releases of jaxlib need on a CPU;
nothing happens in JAX before the first of them is called.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jlora import lapack
from jlora.types import Dynamic

HIGHEST = lax.Precision.HIGHEST


def einsum(spec: str, *operands: Float[Array, "..."]) -> Array:
    """`jnp.einsum` in full precision.

    Args:
      spec: the subscripts.
      *operands: all of one dtype.

    Returns:
      As `jnp.einsum`.
    """
    return jnp.einsum(spec, *operands, precision=HIGHEST)


def matmul(x: Float[Array, "... n k"], y: Float[Array, "... k m"]) -> Array:
    """`x @ y` in full precision.

    Args:
      x: left operand, whose dtype the result has.
      y: right operand, cast to that dtype.

    Returns:
      [..., n, m].
    """
    return jnp.matmul(x, y.astype(x.dtype), precision=HIGHEST)


def svd(
    x: Float[Array, "... n m"], full_matrices: bool = False, compute_uv: bool = True
) -> Dynamic:
    """`jnp.linalg.svd`, thin by default.

    Args:
      x: matrices.
      full_matrices: as in `jnp.linalg.svd`; False, because no caller wants null spaces.
      compute_uv: whether the vectors are returned too.

    Returns:
      (u, s, vt), or s [..., k] alone.
    """
    lapack.ensure()
    return jnp.linalg.svd(x, full_matrices=full_matrices, compute_uv=compute_uv)


def qr(x: Float[Array, "... n m"], mode: str = "reduced") -> Dynamic:
    """`jnp.linalg.qr`.

    Args:
      x: matrices.
      mode: as in `jnp.linalg.qr`.

    Returns:
      (q, r), or r alone in the mode "r".
    """
    lapack.ensure()
    return jnp.linalg.qr(x, mode=mode)


def eigh(x: Float[Array, "... n n"]) -> tuple[Array, Array]:
    """`jnp.linalg.eigh` as a pair.

    Args:
      x: symmetric matrices.

    Returns:
      Ascending eigenvalues [..., n], eigenvectors [..., n, n].
    """
    lapack.ensure()
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors


def eigvalsh(x: Float[Array, "... n n"]) -> Array:
    """The eigenvalues of symmetric matrices.

    Args:
      x: symmetric matrices.

    Returns:
      [..., n], ascending.
    """
    lapack.ensure()
    return jnp.linalg.eigvalsh(x)


def solve(a: Float[Array, "... n n"], b: Float[Array, "... n m"]) -> Array:
    """`jnp.linalg.solve`.

    Args:
      a: matrices.
      b: right-hand sides.

    Returns:
      a^-1 b, [..., n, m].
    """
    lapack.ensure()
    return jnp.linalg.solve(a, b)


def inv(a: Float[Array, "... n n"]) -> Array:
    """The inverse of matrices.

    Args:
      a: matrices.

    Returns:
      [..., n, n].
    """
    lapack.ensure()
    return jnp.linalg.inv(a)


def pinv(a: Float[Array, "... n m"]) -> Array:
    """The pseudo-inverse of matrices.

    Args:
      a: matrices.

    Returns:
      [..., m, n].
    """
    lapack.ensure()
    return jnp.linalg.pinv(a)
