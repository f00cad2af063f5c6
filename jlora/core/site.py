"""A site: one weight that an adapter may change, and its matrix [d_in, d_out].

A leaf of the parameters has axes of three kinds: 's' (a stack of equal layers), 'i' (inputs) and
'o' (outputs). `fold` shows it as matrices [*stack, d_in, d_out], `unfold` goes back.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jlora.types import Dynamic

Arrays = dict[str, jax.Array]


def at_least_float32(dtype: Dynamic) -> Dynamic:
    """`dtype`, but at least float32.

    Args:
      dtype: a floating dtype or its name.

    Returns:
      `dtype` as given where an element has 4 bytes or more, else float32.
    """
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def widened(p: Arrays) -> Arrays:
    """The floating arrays in one dtype, the widest of theirs and float32; the casts are exact.

    Args:
      p: arrays by name; integers and masks are left as they are.

    Returns:
      The same names.
    """
    floating = {k: t for k, t in p.items() if jnp.issubdtype(t.dtype, jnp.floating)}
    dtypes = [jnp.dtype(at_least_float32(t.dtype)) for t in floating.values()]
    dtype = max(dtypes, key=lambda d: d.itemsize, default=None)
    return p | {k: t.astype(dtype) for k, t in floating.items() if t.dtype != dtype}


def transposed(x: Shaped[jax.Array, "*axes"], order: Sequence[int]) -> jax.Array:
    """`jnp.transpose`, without an operation where the order is the present one.

    Args:
      x: any array.
      order: a permutation of its axes.

    Returns:
      x with axis `order[k]` at k.
    """
    return x if list(order) == sorted(order) else jnp.transpose(x, list(order))


def inverse_permutation(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another.

    Args:
      order: a permutation of 0 ... n - 1.

    Returns:
      Where each of 0 ... n - 1 stands in `order`.
    """
    return sorted(range(len(order)), key=order.__getitem__)


def _order(kinds: str) -> list[int]:
    return [k for kind in "sio" for k, c in enumerate(kinds) if c == kind]


def fold(w: Shaped[jax.Array, "*leaf"], kinds: str) -> Shaped[jax.Array, "*stack d_in d_out"]:
    """A leaf as matrices: stack axes first, the others flattened in their order.

    Args:
      w: a leaf of the parameters.
      kinds: one character per axis of `w`: 's' stack, 'i' in, 'o' out.

    Returns:
      [*stack, d_in, d_out].
    """
    size = {kind: [w.shape[k] for k, c in enumerate(kinds) if c == kind] for kind in "sio"}
    w = transposed(w, _order(kinds))
    return w.reshape(*size["s"], math.prod(size["i"]), math.prod(size["o"]))


def unfold(
    m: Shaped[jax.Array, "*stack d_in d_out"], kinds: str, shape: Sequence[int]
) -> Shaped[jax.Array, "*leaf"]:
    """The inverse of `fold`.

    Args:
      m: matrices [*stack, d_in, d_out].
      kinds: one character per axis of the leaf.
      shape: of the leaf.

    Returns:
      The leaf, of that shape.
    """
    order = _order(kinds)
    return transposed(m.reshape([shape[k] for k in order]), inverse_permutation(order))


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight that an adapter may change. Hashable; equality is path, layout and dtype."""

    path: str  # "layers/attention/query/kernel"
    shape: tuple[int, ...]  # of the leaf
    kinds: str  # one character per axis of the leaf: 's' stack, 'i' in, 'o' out
    dtype: Dynamic  # of the leaf
    ops: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what consumes it
    flops: int = dataclasses.field(default=0, compare=False)  # of one call of the function
    views: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # it is used through
    refused: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what needs it merged
    group: str = ""  # key of the tensors shared with other sites, "" when there are none

    def _size(self, kind: str) -> tuple[int, ...]:
        return tuple(n for n, c in zip(self.shape, self.kinds, strict=True) if c == kind)

    @property
    def d_in(self) -> int:
        """Rows of its matrix: the product of the sizes of the 'i' axes."""
        return math.prod(self._size("i"))

    @property
    def d_out(self) -> int:
        """Columns of its matrix: the product of the sizes of the 'o' axes."""
        return math.prod(self._size("o"))

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the 's' axes; () without a stack."""
        return self._size("s")

    @property
    def param_dtype(self) -> Dynamic:
        """The dtype of an adapter's own arrays: the base's, at least float32."""
        return at_least_float32(self.dtype)

    def slice(self) -> "Site":
        """The site of one slice of the stack.

        Returns:
          The same path and dtype, without stack axes.
        """
        keep = [k for k, c in enumerate(self.kinds) if c != "s"]
        shape, kinds = tuple(self.shape[k] for k in keep), "".join(self.kinds[k] for k in keep)
        return dataclasses.replace(self, shape=shape, kinds=kinds)


@dataclasses.dataclass(frozen=True)
class InitContext:
    """What `Method.init` may look at beyond the key and the un-stacked site; never stored."""

    site: Site  # of one slice, as `init` gets it
    leaf: jax.Array | None  # the weight of the slice in the model's layout; None: abstract
    index: jax.Array | int  # of the slice in the flattened stack, int32; 0 without a stack
    shared: Arrays  # the tensors that `Method.shared` made
    siblings: tuple[Site, ...]  # all sites of the same method, with their stacks

    def weight(self) -> Float[jax.Array, "d_in d_out"]:
        """The matrix of the slice.

        Returns:
          [d_in, d_out], in `site.param_dtype`.

        Raises:
          ValueError: the parameters are abstract.
        """
        if self.leaf is None:
            raise ValueError(f"{self.site.path}: this method reads the weight; got an abstract one")
        return fold(self.leaf, self.site.kinds).astype(self.site.param_dtype)
