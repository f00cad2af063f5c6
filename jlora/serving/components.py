r"""Adapters as components of their ranks, and all components of a batch in one pair of products.

=====  ====================================================================================
k      a component: column k of u and row k of v at every site, one after the other
T      components in use, of all adapters of a batch together
o      `owner`, the adapter that a component belongs to, [T]; -1: nobody's
n      `row`, the adapter of a row; -2: the base
=====  ====================================================================================

.. math::
    y = x W + \left([o = n] \odot x U\right) V, \qquad
    U = [u_1 \dots u_T], \quad V = [v_1; \dots; v_T]

The products with U and V are the same for all rows, so that a batch reads every component once,
whatever the number of rows that use it, and an adapter of rank 4 next to one of rank 64 costs 4
components and not 64. What other adapters give is set to zero before V, so it changes nothing,
even where it is not finite.

That is one of the forms, for rows that share adapters. Where every component belongs to one row
only (`own`), the sum is evaluated block by block, each with its row (`jlora.serving.diagonal`);
`jlora.serving.mix` chooses.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA): batches of different ranks without padding.
Deviates: the paper's kernels gather the components of each row from their pages; here they are
    gathered once per change of a batch. In the shared form every row meets the components of the
    whole batch and a mask keeps its own: more arithmetic, no more memory traffic, two dense
    products.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.core import compat
from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.method import Method
from jlora.core.site import Arrays, Site
from jlora.serving import diagonal
from jlora.types import Dynamic

GROUP = "components"  # group of sites that share nothing but whose components are whose
NOBODY, BASE = -1, -2


@dataclasses.dataclass(frozen=True)
class Components(Method):
    """The sites' method: p is {"u": [T, d_in], "v": [T, d_out], "owner": [T], "row": []}.

    Not for `jl.init`: it stands for adapters that there are.
    """

    own: bool = False  # every component is of one row, in blocks of `diagonal.BLOCK`

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        u, v = (t.astype(jnp.float32) for t in (p["u"], p["v"]))
        return jnp.where(_mine(p, 2), u.T, jnp.zeros((), u.dtype)), v

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        y = x @ w
        if self.own and isinstance(x, jax.Array):
            u, v = p["u"].astype(x.dtype), p["v"].astype(x.dtype)
            h = diagonal.inward(x, u, p["owner"], p["row"])
            return y + diagonal.outward(h, v, p["owner"], p["row"]).astype(y.dtype)
        h = compat.matmul(x, p["u"].T.astype(x.dtype), thin=True)
        h = jnp.where(_mine(p, h.ndim), h, jnp.zeros((), h.dtype))
        return y + compat.matmul(h, p["v"].astype(h.dtype), thin=True).astype(y.dtype)


def _mine(p: Arrays, axes: int) -> jax.Array:
    return (p["owner"] == p["row"]).reshape(*[1] * (axes - 1), -1)


def size(sites: Sequence[Site]) -> int:
    """Numbers of one component.

    Args:
      sites: that adapters may have.

    Returns:
      N, the sum of d_in + d_out over sites and their stacks.
    """
    return sum(math.prod(s.stack) * (s.d_in + s.d_out) for s in sites)


def components(adapter: Adapter, sites: Sequence[Site]) -> Float[np.ndarray, "r N"]:
    """An adapter as its components.

    Args:
      adapter: one adapter of any methods whose delta is a product, scale included.
      sites: that adapters may have, in the order of the numbers; those it lacks are zero.

    Returns:
      float32, as many components as its largest rank.

    Raises:
      ValueError: a bank, a site that is not among `sites`, a delta that is no product, or numbers
        that are not finite.
    """
    one_adapter(adapter, "components")
    by_name = {}
    known = {s.path: s for s in sites}
    for site, method in adapter.sites:
        if site.path not in known or site.shape != known[site.path].shape:
            raise ValueError(f"{site.path}: got {site.shape}, expected one of {sorted(known)}")
        pair = _factors(site, method, *adapter.arrays(site))
        if pair is None:
            raise ValueError(f"{site.path}: got {type(method).__name__}, expected a method whose "
                             "delta is a product of factors, as that of LoRA")  # fmt: skip
        u, v = (np.asarray(t, np.float32) for t in pair)
        if not (np.isfinite(u).all() and np.isfinite(v).all()):
            raise ValueError(f"{site.path}: got numbers that are not finite")
        by_name[site.path] = np.moveaxis(u, -1, 0), np.moveaxis(v, -2, 0)  # [r, *stack, d]
    rank = max((len(u) for u, _ in by_name.values()), default=0)
    out = np.zeros((rank, size(sites)), np.float32)
    for path, start, middle, end in _places(sites):
        if path in by_name:
            u, v = by_name[path]
            out[: len(u), start:middle] = u.reshape(len(u), -1)
            out[: len(v), middle:end] = v.reshape(len(v), -1)
    return out


def _factors(site: Site, method: Method, own: Arrays, shared: Arrays) -> Dynamic:
    def one(own: Arrays) -> Dynamic:
        return method.factors(method.prepare({**shared, **own}))

    for _ in site.stack:
        one = jax.vmap(one)
    return one(own)


def _places(sites: Sequence[Site]):
    """(path, where its inputs start, where its outputs start, where they end)."""
    at = 0
    for s in sites:
        n = math.prod(s.stack)
        yield s.path, at, at + n * s.d_in, at + n * (s.d_in + s.d_out)
        at += n * (s.d_in + s.d_out)


def bank(
    flat: Float[Array, "T N"], sites: Sequence[Site], owner: Int[Array, "T"], own: bool = False
) -> Adapter:
    """Components as an adapter for `lift`; `for_row` says whose row it is.

    Args:
      flat: the components of all adapters of a batch.
      sites: as for `components`.
      owner: of each component.
      own: whether n is a row and not an adapter: no two rows of a batch have the same number,
        other than `BASE`, and a block of `diagonal.BLOCK` components has one owner.

    Returns:
      An adapter of method `Components`, for rows of the base.
    """
    frozen: dict[str, Arrays] = {GROUP: {"owner": owner, "row": jnp.asarray(BASE, jnp.int32)}}
    for (path, start, middle, end), s in zip(_places(sites), sites, strict=True):
        u = flat[:, start:middle].reshape(-1, *s.stack, s.d_in)
        v = flat[:, middle:end].reshape(-1, *s.stack, s.d_out)
        behind = len(s.stack)
        frozen[path] = {"u": jnp.moveaxis(u, 0, behind), "v": jnp.moveaxis(v, 0, behind)}
    grouped = tuple((dataclasses.replace(s, group=GROUP), Components(own)) for s in sites)
    return Adapter({s.path: {} for s in sites}, frozen, grouped)


def check_range(flat: Float[np.ndarray, "r N"], dtype: str, name: str) -> None:
    """Refuses components that have no finite value in a shorter dtype.

    Args:
      flat: components of an adapter, finite.
      dtype: that they are to be stored in.
      name: of the adapter, for the message.

    Raises:
      ValueError: a number beyond the largest one of the dtype.
    """
    most, top = float(jnp.finfo(dtype).max), float(np.abs(flat).max(initial=0.0))
    if top > most:
        raise ValueError(f"{name}: got a component of {top:.4g}, expected at most {most:.4g}, the "
                         f"largest {dtype}")  # fmt: skip


def for_row(adapter: Adapter, row: Int[Array, ""]) -> Adapter:
    """A bank for one row.

    Args:
      adapter: of `bank`.
      row: n, the number of the row's adapter; `BASE`: none.

    Returns:
      The same components.
    """
    return adapter.replace(frozen={**adapter.frozen, GROUP: {**adapter.frozen[GROUP], "row": row}})
