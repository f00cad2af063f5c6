"""The contract of an adaptation method: pure functions of one matrix of a site.

`w` is the matrix [d_in, d_out], `p` the arrays that the method keeps for it (trainable and frozen
together), `x` an activation [..., d_in]. An adapter means :math:`W' = \\text{merge}(W, p)`.

Reference: Hu et al. 2021, arXiv:2106.09685, and its successors: every method is a map of the
[in, out] matrix.
Deviates: the scale is data (`frozen["scale"]`), so adapters of different alpha stack.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jaxtyping import Float, Key

from jlora.core import compat
from jlora.core.site import Arrays, InitContext, Site, widened
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of hyper-parameters with functions of ONE matrix.

    The core maps them over stack axes. A method must provide `init` and either `factors` or
    `merge`; `apply` is a fast path. Hyper-parameters that live on as data (alpha, as `scale`) are
    declared `dataclasses.field(compare=False)`, so that adapters that differ in them still stack.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {}  # name -> rank axis from the end; padded by `stack`
    vectors: ClassVar[bool] = False  # may also adapt leaves that no matmul consumes (biases, norms)
    indexed: ClassVar[bool] = False  # `apply` finds ctx["index"]: int32 [], its slice in the stack

    def prepare(self, p: Arrays) -> Arrays:
        """The arrays of one matrix as `factors`, `merge` and `apply` get them from the core.

        Adapters may be kept in bfloat16 or float16; scales, products of factors, norms and
        rotations are computed in at least float32, and meet an activation in its own dtype.

        Args:
          p: the method's arrays by name, as the adapter keeps them.

        Returns:
          The same by name, floating ones in one dtype.
        """
        return widened(p)

    @property
    def merges(self) -> bool:
        """False for methods whose delta depends on x: they have neither merge nor factors."""
        return type(self).merge is not Method.merge or type(self).factors is not Method.factors

    def shared(self, key: Key[jax.Array, ""], sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """Tensors that all sites of this method share; none by default.

        Args:
          key: of random values.
          sites: all sites of the method.

        Returns:
          (trainable, frozen), by name.
        """
        return {}, {}

    def init(
        self, key: Key[jax.Array, ""], site: Site, context: InitContext
    ) -> tuple[Arrays, Arrays]:
        """The method's arrays of one site without stack axes, in `site.param_dtype`.

        Args:
          key: of random values.
          site: the site.
          context: what only some methods ask for: the weight itself, the index of the slice in its
            stack, the shared tensors, the other sites of the method.

        Returns:
          (trainable, frozen), by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.init")

    def factors(
        self, p: Arrays
    ) -> tuple[Float[jax.Array, "d_in R"], Float[jax.Array, "R d_out"]] | None:
        """The delta as a product, where it has one.

        Args:
          p: the arrays, as `prepare` returns them.

        Returns:
          u [d_in, R], v [R, d_out] with merge(w, p) == w + u @ v; None when there are none.
        """
        return None

    def of_factors(
        self, u: Float[jax.Array, "d_in R"], v: Float[jax.Array, "R d_out"]
    ) -> Arrays | None:
        """Arrays of this method with given factors, for a part of a weight.

        Needed where `apply` does more than `factors` say (dropout, reports).

        Args:
          u: the left factor.
          v: the right one.

        Returns:
          Arrays whose `factors` are u and v; None: there are none.
        """
        return None

    def merge(self, w: Float[jax.Array, "d_in d_out"], p: Arrays) -> Float[jax.Array, "d_in d_out"]:
        """The definition: the merged matrix.

        Args:
          w: the base matrix, of one dtype with the floating arrays of p.
          p: the arrays, as `prepare` returns them.

        Returns:
          W' [d_in, d_out].

        Raises:
          NotImplementedError: the delta depends on x.
        """
        uv = self.factors(p)
        if uv is None:
            raise NotImplementedError(f"{type(self).__name__} has no merge: its delta depends on x")
        return add_low_rank(w, *uv)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """The fast path: x @ merge(w, p), without forming the merged matrix where the method can.

        A third element of the result, {name: value}, also publishes: later sites of the same scope
        (the body of a scan, a checkpoint, the function) find the values in their `ctx`.

        Args:
          x: [..., d_in], or stands for it (rows of an embedding, patches of a convolution): `x @ m`
            with m [d_in, k] always works.
          w: stands for the base matrix: `x @ w` runs the model's own matmul, `w.dense()` is the
            matrix, `w.merged(self, p)` the merged one.
          p: the arrays, as `prepare` returns them; cast what meets x to `x.dtype`.
          ctx: what `lift` was given by name, such as a dropout `key`, and what earlier sites
            published.

        Returns:
          y [..., d_out], which is cast to the model's dtype; or (y, {name: report}).
        """
        uv = self.factors(p)
        if uv is None:
            return x @ w.merged(self, p)
        y = x @ w
        return y + low_rank(x, *uv).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class Wrapper(Method):
    """Base of methods around another method: they keep its arrays.

    What it means is the subclass's own: `merge` or `factors`, and `apply`. `stack` and the readers
    of files reach the rank of the innermost method through `rank_of` and `with_rank`.
    """

    method: Method

    @property
    def rank_axes(self) -> Mapping[str, int]:  # type: ignore[override]
        return self.method.rank_axes

    @property
    def indexed(self) -> bool:  # type: ignore[override]
        return self.method.indexed

    def prepare(self, p: Arrays) -> Arrays:
        """As the wrapped method."""
        return self.method.prepare(p)

    def shared(self, key: Key[jax.Array, ""], sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """As the wrapped method."""
        return self.method.shared(key, sites)

    def init(
        self, key: Key[jax.Array, ""], site: Site, context: InitContext
    ) -> tuple[Arrays, Arrays]:
        """As the wrapped method."""
        return self.method.init(key, site, context)


def innermost(method: Method) -> Method:
    """The method inside all wrappers.

    Args:
      method: any method.

    Returns:
      The first one that is no `Wrapper`.
    """
    while isinstance(method, Wrapper):
        method = method.method
    return method


def rank_of(method: Method) -> int:
    """The rank of the innermost method.

    Args:
      method: any method.

    Returns:
      0 where it has none.
    """
    return getattr(innermost(method), "rank", 0)


def with_rank(method: Method, rank: int) -> Method:
    """A method with another rank of the innermost one.

    Args:
      method: any method.
      rank: the new rank.

    Returns:
      `method` itself where it has no rank.
    """
    if isinstance(method, Wrapper):
        return dataclasses.replace(method, method=with_rank(method.method, rank))
    return dataclasses.replace(method, rank=rank) if hasattr(method, "rank") else method


@jax.custom_jvp
def add_low_rank(
    w: Float[jax.Array, "d_in d_out"], u: Float[jax.Array, "d_in R"], v: Float[jax.Array, "R d_out"]
) -> Float[jax.Array, "d_in d_out"]:
    """w + u @ v; thin factors as a sum of outer products, in one pass over w.

    XLA fuses the sum, so no product is held separate from w; on a CPU at rank 8: a sixth of the
    time
    in place, half into new arrays.

    Args:
      w: the matrix.
      u: left factor.
      v: right factor.

    Returns:
      [d_in, d_out].
    """
    if u.shape[1] > 16:
        with jax.default_matmul_precision("highest"):
            return w + u @ v
    return _outer(w, u, v)


@jax.jit
def _outer(w: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    return sum((u[:, k, None] * v[None, k] for k in range(u.shape[1])), w)


@add_low_rank.defjvp
def _add_low_rank_jvp(at: Dynamic, along: Dynamic) -> tuple[jax.Array, jax.Array]:
    (w, u, v), (dw, du, dv) = at, along
    with jax.default_matmul_precision("highest"):  # JAX may trace this outside of the caller's
        return add_low_rank(w, u, v), dw + du @ v + u @ dv


def low_rank(
    x: Dynamic, u: Float[jax.Array, "d_in R"], v: Float[jax.Array, "R d_out"]
) -> jax.Array:
    """x @ u @ v, the thin product first; sharded as x and v are.

    Args:
      x: [..., d_in], or what stands for it.
      u: left factor, cast to the dtype of x.
      v: right factor, cast likewise.

    Returns:
      [..., d_out], in the dtype of x.
    """
    inner = compat.matmul(x, u.astype(x.dtype), thin=True)
    return compat.matmul(inner, v.astype(x.dtype), thin=True)
