"""The contract: a site, a method on one site, an adapter beside the parameters, a bank of adapters.

`w` is one matrix [d_in, d_out] of a site, `p` the arrays that a method keeps for it (trainable and
frozen together), `x` an activation [..., d_in]. An adapter means :math:`W' = \\text{merge}(W, p)`.

Source: our reading of the low-rank adaptation literature (Hu et al. 2021, arXiv:2106.09685, and
its successors): every method is a map of the [in, out] matrix.
Deviates: the scale is data (`frozen["scale"]`), so adapters of different alpha stack.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core import compat
from jlora.core.bank import Banked

Arrays = dict[str, jax.Array]


def wide(dtype: Any) -> Any:
    """`dtype`, but at least float32."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def widened(p: Arrays) -> Arrays:
    """`p` with its floating arrays in one dtype, the widest of theirs and float32; exact."""
    floating = {k: t for k, t in p.items() if jnp.issubdtype(t.dtype, jnp.floating)}
    dtypes = [jnp.dtype(wide(t.dtype)) for t in floating.values()]
    dtype = max(dtypes, key=lambda d: d.itemsize, default=None)
    return p | {k: t.astype(dtype) for k, t in floating.items() if t.dtype != dtype}


def transposed(x: jax.Array, order: Sequence[int]) -> jax.Array:
    return x if list(order) == sorted(order) else jnp.transpose(x, list(order))


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return sorted(range(len(order)), key=order.__getitem__)


def _order(kinds: str) -> list[int]:
    return [k for kind in "sio" for k, c in enumerate(kinds) if c == kind]


def fold(w: jax.Array, kinds: str) -> jax.Array:
    """A leaf as [*stack, d_in, d_out]: stack axes first, the others flattened in their order."""
    size = {kind: [w.shape[k] for k, c in enumerate(kinds) if c == kind] for kind in "sio"}
    w = transposed(w, _order(kinds))
    return w.reshape(*size["s"], math.prod(size["i"]), math.prod(size["o"]))


def unfold(m: jax.Array, kinds: str, shape: Sequence[int]) -> jax.Array:
    """The inverse of `fold`."""
    order = _order(kinds)
    return transposed(m.reshape([shape[k] for k in order]), inverse(order))


@dataclasses.dataclass(frozen=True)
class Bound:
    """What `init` may look at while it runs; never stored."""

    weight: jax.Array | None  # the leaf of this slice, in the model's own layout
    row: jax.Array | int  # flat index of this slice in the stack, int32
    shared: Arrays  # the tensors that `Method.shared` made
    siblings: tuple["Site", ...]  # all sites of the same method


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight that an adapter may change. Hashable; equality is path, layout and dtype."""

    path: str  # "layers/attention/query/kernel"
    shape: tuple[int, ...]  # of the leaf
    kinds: str  # one char an axis of the leaf: 's' stack, 'i' in, 'o' out
    dtype: Any  # of the leaf
    ops: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what consumes it
    flops: int = dataclasses.field(default=0, compare=False)  # of one call of the function
    views: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # it is used through
    refused: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what needs it merged
    group: str = ""  # key of the tensors shared with other sites, "" when there are none
    bound: Bound | None = dataclasses.field(default=None, compare=False, repr=False)

    def _size(self, kind: str) -> tuple[int, ...]:
        return tuple(n for n, c in zip(self.shape, self.kinds, strict=True) if c == kind)

    @property
    def d_in(self) -> int:
        return math.prod(self._size("i"))

    @property
    def d_out(self) -> int:
        return math.prod(self._size("o"))

    @property
    def stack(self) -> tuple[int, ...]:
        return self._size("s")

    @property
    def param_dtype(self) -> Any:
        """The dtype of an adapter's own arrays: the base's, at least float32."""
        return wide(self.dtype)

    @property
    def row(self) -> jax.Array | int:
        return self._bound.row

    @property
    def shared(self) -> Arrays:
        return self._bound.shared

    @property
    def siblings(self) -> tuple["Site", ...]:
        return self._bound.siblings

    @property
    def _bound(self) -> Bound:
        if self.bound is None:
            raise ValueError(f"{self.path}: only a site given to Method.init knows its weight")
        return self.bound

    def weight(self) -> jax.Array:
        """The matrix [d_in, d_out] of this slice, in `param_dtype`; only inside `Method.init`."""
        w = self._bound.weight
        if w is None:
            raise ValueError(f"{self.path}: this method reads the weight; got an abstract one")
        return fold(w, self.kinds).astype(self.param_dtype)

    def given(self, w: Any, shared: Arrays, siblings: tuple["Site", ...]) -> "Site":
        """What `Method.init` is given of the first slice, whose weight is `w`."""
        return self.slice(Bound(w, 0, shared, siblings))

    def slice(self, bound: Bound | None = None) -> "Site":
        """The site without its stack axes."""
        keep = [k for k, c in enumerate(self.kinds) if c != "s"]
        shape, kinds = tuple(self.shape[k] for k in keep), "".join(self.kinds[k] for k in keep)
        return dataclasses.replace(self, shape=shape, kinds=kinds, bound=bound)


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of hyper-parameters with functions of ONE matrix.

    The core maps them over stack axes. A method owes `init` and either `factors` or `merge`;
    `apply` is a fast path. Hyper-parameters that live on as data (alpha, as `scale`) are declared
    `dataclasses.field(compare=False)`, so that adapters that differ in them still stack.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {}  # name -> rank axis from the end; padded by `stack`
    vectors: ClassVar[bool] = False  # may also adapt leaves that no matmul consumes (biases, norms)

    def prepare(self, p: Arrays) -> Arrays:
        """The arrays of one matrix as `factors`, `merge` and `apply` get them from the core.

        Adapters may be kept in bfloat16 or float16; scales, products of factors, norms and
        rotations are computed in at least float32, and meet an activation in its own dtype.
        """
        return widened(p)

    @property
    def merges(self) -> bool:
        """False for methods whose delta depends on x: they have neither merge nor factors."""
        return type(self).merge is not Method.merge or type(self).factors is not Method.factors

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """(trainable, frozen) tensors that all sites of this method share; none by default."""
        return {}, {}

    def init(self, key: jax.Array, site: Site) -> tuple[Arrays, Arrays]:
        """(trainable, frozen) arrays of one un-stacked site, in `site.param_dtype`."""
        raise NotImplementedError(f"{type(self).__name__}.init")

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        """(u [d_in, R], v [R, d_out]) with merge(w, p) == w + u @ v; None when there are none."""
        return None

    def of_factors(self, u: jax.Array, v: jax.Array) -> Arrays | None:
        """Arrays of this method whose `factors` are u [d_in, R] and v [R, d_out], or None.

        For a part of a weight, on which `apply` does more than `factors` say (dropout, reports).
        """
        return None

    def merge(self, w: jax.Array, p: Arrays) -> jax.Array:
        """The definition. `w` [d_in, d_out] and the floating arrays of `p` have one dtype."""
        uv = self.factors(p)
        if uv is None:
            raise NotImplementedError(f"{type(self).__name__} has no merge: its delta depends on x")
        return updated(w, *uv)

    def apply(self, x: Any, w: Any, p: Arrays, ctx: Mapping[str, Any]) -> Any:
        """y [..., d_out] == x @ merge(w, p); may return (y, {name: report}) instead.

        `x` is [..., d_in], or stands for it (rows of an embedding, patches of a convolution):
        `x @ m` with m [d_in, k] always works. `x @ w` runs the model's own matmul. `w.dense()`
        is the base matrix, `w.merged(self, p)` the merged one. The floating arrays of `p` have one
        dtype, at least float32 (cast what meets x to `x.dtype`); the result is cast to the model's.
        """
        uv = self.factors(p)
        if uv is None:
            return x @ w.merged(self, p)
        y = x @ w
        return y + low_rank(x, *uv).astype(y.dtype)


@jax.custom_jvp
def updated(w: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """w + u @ v; thin factors as a sum of outer products, one pass over w and no product beside it.

    XLA fuses the sum; on a CPU at rank 8: a sixth of the time in place, half into new arrays.
    """
    if u.shape[1] > 16:
        return w + u @ v
    return _outer(w, u, v)


@jax.jit
def _outer(w: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    return sum((u[:, k, None] * v[None, k] for k in range(u.shape[1])), w)


@updated.defjvp
def _updated_jvp(at: Any, along: Any) -> tuple[jax.Array, jax.Array]:
    (w, u, v), (dw, du, dv) = at, along
    return updated(w, u, v), dw + du @ v + u @ dv


def low_rank(x: Any, u: jax.Array, v: jax.Array) -> jax.Array:
    """x @ u @ v in the dtype of x, the thin product first; sharded as x and v are."""
    inner = compat.matmul(x, u.astype(x.dtype), thin=True)
    return compat.matmul(inner, v.astype(x.dtype), thin=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Adapter(Banked):
    """The parameters of one adapter; with one more leading axis on every array, a bank of them."""

    trainable: dict[str, Arrays]  # path -> name -> array, leading stack axes
    frozen: dict[str, Arrays]  # the same for what is not trained (scales, bases, masks)
    sites: tuple[tuple[Site, Method], ...] = dataclasses.field(metadata={"static": True})

    def replace(self, **changes: Any) -> "Adapter":
        return dataclasses.replace(self, **changes)

    def arrays(self, site: Site) -> tuple[Arrays, Arrays]:
        """(own, shared) arrays of a site, trainable and frozen together; only own are stacked."""
        own, shared = (
            {**self.frozen.get(key, {}), **self.trainable.get(key, {})}
            for key in (site.path, site.group)
        )
        return own, shared if site.group else {}  # "" is the path of parameters that are one array


def key_of(key: jax.Array, text: str) -> jax.Array:
    """A key for a name, the same in every run and for every set of names."""
    return jax.random.fold_in(key, zlib.crc32(text.encode()))


def initialise(
    key: jax.Array, sites: Sequence[tuple[Site, Method]], weights: Mapping[str, Any]
) -> Adapter:
    """A fresh adapter for `sites`. The leaves of `weights` [*leaf] are read only where needed."""
    trainable: dict[str, Arrays] = {}
    frozen: dict[str, Arrays] = {}
    shared: dict[str, tuple[Method, tuple[Site, ...], Arrays]] = {}
    for group in dict.fromkeys(site.group for site, _ in sites):
        members = tuple(site for site, _ in sites if site.group == group)
        method = next(m for s, m in sites if s.group == group)
        t, f = method.shared(key_of(key, group), members)
        shared[group] = (method, members, {**f, **t})
        for part, arrays in ((trainable, t), (frozen, f)):
            if arrays:
                part[group] = dict(arrays)
    done = []
    for site, method in sorted(sites, key=lambda sm: sm[0].path):
        _, members, common = shared[site.group]
        t, f = _init_site(key_of(key, site.path), site, method, weights, members, common)
        trainable[site.path], frozen[site.path] = dict(t), dict(f)
        done.append((dataclasses.replace(site, group=site.group if common else ""), method))
    return Adapter(trainable, frozen, tuple(done))


def _init_site(key, site, method, weights, members, common):
    w = weights[site.path]
    w = w.dequantize() if hasattr(w, "dequantize") else w
    w = None if isinstance(w, jax.ShapeDtypeStruct) else w

    def one(key, row, w):
        return method.init(key, site.slice(Bound(w, row, common, members)))

    if not site.stack:
        return one(key, 0, w)
    n, axes = math.prod(site.stack), [k for k, c in enumerate(site.kinds) if c == "s"]
    if w is not None:
        w = jnp.moveaxis(w, axes, range(len(axes))).reshape(n, *site.slice().shape)
    rows = jnp.arange(n, dtype=jnp.int32)
    made = jax.vmap(one, in_axes=(0, 0, None if w is None else 0))(
        jax.random.split(key, n), rows, w
    )
    return jax.tree.map(lambda t: t.reshape(*site.stack, *t.shape[1:]), made)


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """A bank: every array gains a leading axis; smaller ranks are padded with zeros.

    Raises ValueError for no adapters, or when they have other sites, methods or arrays.
    """
    if not adapters:
        raise ValueError("stack: got no adapters, expected at least one")
    first = adapters[0]
    for k, other in enumerate(adapters):
        for (s0, m0), (s1, m1) in zip(first.sites, other.sites, strict=False):
            if s0 != s1 or type(m0) is not type(m1):
                raise ValueError(f"adapter {k}: got {s1.path} {m1}, expected {s0.path} {m0}")
        if len(first.sites) != len(other.sites):
            raise ValueError(
                f"adapter {k}: got {len(other.sites)}, expected {len(first.sites)} sites"
            )
    ranks = {}
    for i, (site, _) in enumerate(first.sites):
        same = [a.sites[i][1] for a in adapters]
        top = max(same, key=lambda m: getattr(getattr(m, "method", m), "rank", 0))
        if any(_with_rank(m, top) != top for m in same):
            raise ValueError(f"{site.path}: methods differ in more than rank: {same}")
        ranks[site.path] = top
    return Adapter(
        _stack_part([a.trainable for a in adapters], ranks),
        _stack_part([a.frozen for a in adapters], ranks),
        tuple((site, ranks[site.path]) for site, _ in first.sites),
    )


def _with_rank(method: Any, top: Any) -> Any:
    """`method`, or the one that it wraps, of the rank of `top`."""
    if hasattr(method, "method"):
        return dataclasses.replace(method, method=_with_rank(method.method, top.method))
    ranked = hasattr(method, "rank") and hasattr(top, "rank")
    return dataclasses.replace(method, rank=top.rank) if ranked else method


def _stack_part(parts, methods):
    def pad(path, *leaves):
        where, name = path[0].key, path[1].key
        axes = methods[where].rank_axes if where in methods else {}
        if name in axes and len({t.shape for t in leaves}) > 1:
            top = max(t.shape[axes[name]] for t in leaves)
            leaves = [_pad(t, axes[name], top) for t in leaves]
        if len({t.shape for t in leaves}) > 1:
            raise ValueError(f"{where}/{name}: shapes differ: {[t.shape for t in leaves]}")
        return jnp.stack(leaves)

    return jax.tree_util.tree_map_with_path(pad, *parts)


def _pad(t: jax.Array, axis: int, size: int) -> jax.Array:
    width = [(0, 0)] * t.ndim
    width[axis] = (0, size - t.shape[axis])
    return jnp.pad(t, width)


def pick(bank: Adapter, i: Any) -> Adapter:
    """Adapter `i` of a bank; `i` may be traced."""
    return bank[i]
