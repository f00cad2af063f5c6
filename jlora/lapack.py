"""A work-around for batched factorisations on CPUs, which deadlock in jaxlib 0.9.1 to 0.11.1.

In those releases the LAPACK kernel of a batch (qr, svd, eigh, cholesky, ...) hands parts of it to
the thread pool that it runs in, and waits for them. When as many kernels run at once as the pool
has threads, every thread waits for work that no thread is left to do: the process deadlocks
silently. Merging a bank is made of such calls. For those releases only, a large batch is lowered
to a loop over its matrices, as later releases do within the kernel. The factors are the same bit
for bit; GPUs and TPUs are not touched.

`jlora.numerics` installs it with jlora's first factorisation. From then on it holds for the whole
process, for what is compiled later. ``JLORA_LAPACK=0`` in the environment switches it off.

Reference: jaxlib's lapack_kernels.cc of those releases, and the threads of hung processes.
Deviates: meshes with Explicit axes keep JAX's own form, whose loop would have to name shardings.
"""

import functools
import math
import os
from collections.abc import Callable

import jax
import jaxlib
from jax import Array
from jax.sharding import AxisType
from jaxtyping import Shaped

from jlora.types import Dynamic

FIRST, FIXED = (0, 9, 1), (0, 11, 2)  # the releases of jaxlib between them are concerned
ALONE = 200_000  # kernels take a batch of less work, in their own estimate of FLOPs, in one part
PRIMITIVES = (
    "cholesky",
    "eig",
    "eigh",
    "geqp3",
    "geqrf",
    "hessenberg",
    "householder_product",
    "lu",
    "ormqr",
    "schur",
    "svd",
    "triangular_solve",
    "tridiagonal",
)


def concerned(version: str = jaxlib.__version__) -> bool:
    """Whether this release of jaxlib is one of those.

    Args:
      version: of jaxlib; the installed one.

    Returns:
      True for 0.9.1 to 0.11.1.
    """
    number = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    return FIRST <= number < FIXED


def parallel(shapes: list[tuple[int, ...]]) -> bool:
    """Whether a kernel may divide operands of these shapes: an upper bound of its estimate.

    Args:
      shapes: of the operands, [batch..., m, n].

    Returns:
      False where the kernel runs the whole batch in one thread.
    """
    cost = max(30 * math.prod(s[-2:]) * max(s[-2:], default=0) for s in shapes)
    batch = math.prod(shapes[0][:-2])
    return batch > 1 and batch * cost >= ALONE


def one_by_one(primitive: Dynamic, *operands: Shaped[Array, "..."], **params: Dynamic) -> Dynamic:
    """A primitive on batched operands as a loop over the batch, with the same result.

    Args:
      primitive: JAX's.
      *operands: [batch..., m, n].
      params: of the primitive.

    Returns:
      As the primitive returns.
    """
    batch = operands[0].shape[:-2]
    flat = tuple(x.reshape(-1, *x.shape[len(batch) :]) for x in operands)
    out = jax.lax.map(lambda each: primitive.bind(*each, **params), flat)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)


@functools.cache
def ensure() -> None:
    """Installs the work-around once, where this jaxlib needs it and it is not switched off."""
    if concerned() and os.environ.get("JLORA_LAPACK") != "0":
        install()


def install() -> list[str]:
    """Replaces the lowerings for CPUs.

    Returns:
      The names of the primitives whose lowering was replaced.
    """
    from jax._src.interpreters import mlir
    from jax._src.lax import linalg

    done = []
    for name in PRIMITIVES:
        primitive: Dynamic = getattr(linalg, f"{name}_p", None)
        entry = mlir._platform_specific_lowerings["cpu"].get(primitive)
        if entry is None or hasattr(entry.rule, "one_by_one"):
            continue
        rule = functools.partial(_lowered, mlir.lower_fun, primitive, entry.rule)
        rule.one_by_one = True  # type: ignore[attr-defined]
        mlir.register_lowering(primitive, rule, platform="cpu", inline=entry.inline)
        done.append(name)
    return done


def _lowered(
    lower_fun: Callable,
    primitive: Dynamic,
    rule: Callable,
    ctx: Dynamic,
    *operands: Dynamic,
    **params: Dynamic,
) -> Dynamic:
    """JAX's own rule, or the loop where that rule's kernel could divide the batch."""
    axes = getattr(getattr(ctx.avals_in[0], "sharding", None), "mesh", None)
    explicit = AxisType.Explicit in getattr(axes, "axis_types", ())
    shapes = [aval.shape for aval in ctx.avals_in]
    fixed = all(isinstance(d, int) for shape in shapes for d in shape)
    if explicit or not fixed or not parallel(shapes):
        return rule(ctx, *operands, **params)
    loop = functools.partial(one_by_one, primitive, **params)
    return lower_fun(loop, multiple_results=primitive.multiple_results)(ctx, *operands)
