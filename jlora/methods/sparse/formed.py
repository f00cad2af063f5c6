r"""When a delta of few numbers is formed: a choice by counted operations, made as a step is traced.

A delta of n numbers can be multiplied number by number, or written into the weight first. For T
tokens and a weight [d_in, d_out], of which the numbers are entries, forward and backward pass take

.. math::
    3 \, T \, n \, E \quad \text{multiply-adds one by one,} \qquad
    d_{in} d_{out} \, (T + F) \quad \text{formed}

more than the base: E = 100 is what an entry costs that is gathered, multiplied and added up (160 on
one core of a CPU at 384 x 384, where products of matrices are fast), F = 64 what an entry of the
weight costs that is written, read again and has its gradient gathered; T is the product of the
tokens with the gradient of the weight, whose other entries are dropped at once. So for one token
the weight stays as it is, and for a batch it is formed where more than 1 in 300 of its entries are
trained. The formed weight is made again in the backward pass where that is cheap.

Reference: none; times by ``python -m benchmarks.methods``.
Deviates: nothing.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.core import compat
from jlora.core.method import Method
from jlora.core.site import Arrays
from jlora.types import Dynamic

ENTRY = 100  # multiply-adds of a matrix product that one gathered and added entry costs
FORMING = 64  # the same, of an entry of the weight that is written, read, and has a gradient
WHY = "for a batch the weight's gradient, whose entries are gathered, costs less than one by one"


class Weight(Protocol):
    """The `w` of `Method.apply`, as far as it is used here."""

    shape: tuple[int, ...]
    dtype: Dynamic

    def __rmatmul__(self, x: Dynamic) -> jax.Array: ...

    def merged(self, method: Method, p: Arrays) -> jax.Array:
        """The merged matrix in the dtype that the model multiplies with.

        Args:
          method: whose `merge` it is.
          p: its arrays.

        Returns:
          [d_in, d_out].
        """
        ...


def tokens(x: Float[Array, "... d"]) -> int:
    """How many rows an activation has.

    Args:
      x: [..., d].

    Returns:
      The product of its leading axes.
    """
    return math.prod(x.shape[:-1])


def cheaper(one_by_one: float, rows: int, shape: tuple[int, ...], forming: float = 0.0) -> bool:
    """Whether a delta is formed.

    Args:
      one_by_one: multiply-adds of forward and backward pass without forming it.
      rows: tokens of the activation.
      shape: (d_in, d_out).
      forming: multiply-adds per entry of making it, in both passes, besides writing and reading it.

    Returns:
      True where the operations of the formed delta are fewer.
    """
    return math.prod(shape) * (rows + FORMING + forming) < one_by_one


def entries_are_cheaper(count: int, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether entries of a weight are multiplied one by one.

    Args:
      count: n, of the trained entries.
      rows: tokens of the activation.
      shape: (d_in, d_out).

    Returns:
      True where that takes fewer operations than the formed delta.
    """
    return not cheaper(3.0 * rows * count * ENTRY, rows, shape)


def times_formed(
    method: Method, x: Float[Array, "... d_in"], w: Weight, p: Arrays, keep: bool = False
) -> jax.Array:
    """x @ merge(w, p), the merged matrix written down.

    In a model that multiplies in less than float32 the delta is a product of its own: rounded into
    the weight, small numbers would be lost.

    Args:
      method: whose merged matrix it is.
      x: activations.
      w: the base weight, as `Method.apply` gets it.
      p: the arrays of `method`, its numbers as "c".
      keep: whether the backward pass finds the matrix; False: it is made again, as is right where
        that is a pass or so over it.

    Returns:
      [..., d_out], in the dtype of x.
    """
    narrow = jnp.finfo(w.dtype).bits < 32

    def run(x: jax.Array, p: Arrays) -> jax.Array:
        if narrow:
            delta = method.merge(jnp.zeros(w.shape, p["c"].dtype), p)
            return compat.matmul(x, delta.astype(x.dtype))
        return compat.matmul(x, w.merged(method, p).astype(x.dtype))

    y = (run if keep else jax.checkpoint(run))(x, p)
    return x @ w + y if narrow else y
