"""Products in full precision and factorisations: what every room computes with, once.

Products use the highest precision of the backend (TPUs and GPUs would otherwise round float32
operands). Factorisations go through `jlora.lapack`, which some releases of jaxlib need on a CPU;
nothing happens in JAX before the first of them is called.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jlora import lapack

HIGHEST = lax.Precision.HIGHEST


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum` in full precision; all operands of one dtype."""
    return jnp.einsum(spec, *operands, precision=HIGHEST)


def matmul(x: Array, y: Array) -> Array:
    """x [..., n, k] @ y [..., k, m] in full precision, in the dtype of x."""
    return jnp.matmul(x, y.astype(x.dtype), precision=HIGHEST)


def svd(x: Array, full_matrices: bool = False, compute_uv: bool = True) -> Any:
    """`jnp.linalg.svd` of [..., n, m]; thin by default."""
    lapack.ensure()
    return jnp.linalg.svd(x, full_matrices=full_matrices, compute_uv=compute_uv)


def qr(x: Array, mode: str = "reduced") -> Any:
    """`jnp.linalg.qr` of [..., n, m]."""
    lapack.ensure()
    return jnp.linalg.qr(x, mode=mode)


def eigh(x: Array) -> tuple[Array, Array]:
    """`jnp.linalg.eigh` of symmetric [..., n, n]: ascending eigenvalues, eigenvectors."""
    lapack.ensure()
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors


def eigvalsh(x: Array) -> Array:
    """The eigenvalues of symmetric [..., n, n], ascending."""
    lapack.ensure()
    return jnp.linalg.eigvalsh(x)


def solve(a: Array, b: Array) -> Array:
    """`jnp.linalg.solve`: a^-1 b."""
    lapack.ensure()
    return jnp.linalg.solve(a, b)


def inv(a: Array) -> Array:
    """The inverse of [..., n, n]."""
    lapack.ensure()
    return jnp.linalg.inv(a)


def pinv(a: Array) -> Array:
    """The pseudo-inverse of [..., n, m]."""
    lapack.ensure()
    return jnp.linalg.pinv(a)
