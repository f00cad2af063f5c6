"""A bank laid out for rows that use different adapters: each layer picks its own, when it runs.

=======  =====================================================================================
N        adapters of the bank
i        the adapter of a row, `served[i]`; an int or traced, under jax.vmap one a row
p_n      arrays of adapter n at one site; with stack axes [*stack, ...]
=======  =====================================================================================

.. math:: y_{row} = \\mathrm{apply}(x_{row}, W, p_{i(row)})

`bank[i]` under `jax.vmap` copies every array of every row before the model starts, and again into
the order in which a scan over layers reads them. Here the axis of the adapters lies behind the
stack axes, [*stack, N, ...]; what the model carries is the index, and a layer gathers the arrays
of its rows only, [rows, ...]. Answers and gradients are the same up to rounding.

    served = jl.serving_bank(bank)                                              # once
    jax.vmap(lambda i, x: tuned(params, served[i], x))(ids, xs)         # every call

Shapes: bank arrays [N, *stack, ...] or, of tensors that sites share, [N, ...].

Errors: `rows` raises ValueError where the arrays have no common leading axis, as those of one
adapter do. A Python or numpy integer outside -N..N-1 raises IndexError; of arrays, traced or
not, JAX clamps what is outside.

Paper: the idea of one batch over many adapters is of Punica (arXiv:2310.18547) and S-LoRA
(arXiv:2311.03285).
Deviates: no kernel of our own: a gather, batched thin products, a sum that XLA fuses (`spread`).
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core import compat
from jlora.core.adapter import Adapter
from jlora.core.method import Wrapper
from jlora.core.site import Arrays, InitContext, Site, at_least_float32
from jlora.system import System
from jlora.types import Dynamic

GROUP, INDEX = "served rows", "index"  # group of sites that share nothing else; its array
THIN = 16  # factors of a rank up to it are written out


@dataclasses.dataclass(frozen=True)
class PerExample(Wrapper):
    """`method` on the arrays that `index` picks; p is {"index": [], name + "[]": [N, ...]}.

    A matrix that ends in its rank is kept transposed, name + "[].T": its rows are then copied
    whole, and the product that reads it wants it so.

    Not for `jl.init`: it stands for adapters that there are.
    """

    @property
    def merges(self) -> bool:
        return self.method.merges

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        raise NotImplementedError(
            "PerExample: stands for adapters that exist; use jl.serving_bank(bank)"
        )

    def prepare(self, p: Arrays) -> Arrays:
        """The arrays of one adapter; only those are made float32."""
        return self.method.prepare(_picked(p))

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array] | None:
        return self.method.factors(p)

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        return self.method.merge(w, p)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """The method's own, or where it is x W + x u v with thin u, v: `spread` for the last."""
        uv = None if "key" in ctx else self.method.factors(p)
        if uv is None or uv[0].shape[1] > THIN:
            return self.method.apply(x, w, p, ctx)
        u, v = (t.astype(x.dtype) for t in uv)
        y = x @ w
        return y + spread(compat.matmul(x, u, thin=True), v).astype(y.dtype)


@jax.custom_jvp
def spread(h: Float[Array, "... r"], v: Float[Array, "r n"]) -> jax.Array:
    """h @ v as a sum of R outer products; where it is differentiated, a product.

    XLA fuses the sum with the one it goes into: one pass over that, and no batch of small products
    alongside it (half of their time on one core, and cores share it). A gradient wants the
    products.

    Args:
      h: thin activations.
      v: second factor.

    Returns:
      [..., n], in the dtype of h.
    """
    if compat.explicit(h):
        return compat.matmul(h, v, thin=True)
    v = jax.lax.optimization_barrier(v)  # its scale is multiplied in once, not for every token
    dtype, row = at_least_float32(h.dtype), (*[1] * (h.ndim - 1), v.shape[1])
    rows = (v[k].astype(dtype).reshape(row) for k in range(v.shape[0]))
    parts = (h[..., k, None].astype(dtype) * r for k, r in enumerate(rows))
    return functools.reduce(operator.add, parts).astype(h.dtype)


@spread.defjvp
def _spread_jvp(at: Dynamic, along: Dynamic) -> tuple[jax.Array, jax.Array]:
    (h, v), (dh, dv) = at, along
    y, *dy = (compat.matmul(*pair, thin=True) for pair in ((h, v), (dh, v), (h, dv)))
    return y, dy[0] + dy[1]


def _picked(p: Arrays) -> Arrays:
    i, picked = p[INDEX], {}
    for key, t in p.items():
        name, leaf, turned = key.partition("[]")
        if leaf:
            picked[name] = t[i].mT if turned else t[i]
    return picked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServingBank:
    """A bank in serving order. `served[i]` is adapter i, for `lift`, `merge` and `delta`."""

    bank: Adapter  # its methods are `PerExample`, its arrays [*stack, N, ...]
    count: int = dataclasses.field(metadata={"static": True})  # N

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: Dynamic) -> Adapter:
        if isinstance(i, int | np.integer):
            if not -self.count <= i < self.count:
                raise IndexError(f"adapter {i}: the bank has {self.count}")
            i %= self.count
        index = jnp.asarray(i, jnp.int32)
        frozen = {
            path: arrays | {INDEX: index} if INDEX in arrays else arrays
            for path, arrays in self.bank.frozen.items()
        }
        return self.bank.replace(frozen=frozen)


def serving_bank(bank: Adapter) -> ServingBank:
    """A bank in serving order: one copy of its arrays.

    Args:
      bank: of `jl.stack`.

    Returns:
      The bank; `served[i]` is adapter i.

    Raises:
      ValueError: a bank that is already in serving order, or one adapter.
    """
    if any(isinstance(method, PerExample) for _, method in bank.sites):
        raise ValueError("expected a bank of jl.stack, got one already in serving order")
    sizes = {t.shape[:1] for t in jax.tree.leaves(bank)}
    if len(sizes) != 1 or () in sizes:
        layers = sorted(s[0] if s else 0 for s in sizes)
        raise ValueError(f"expected a bank, one leading axis in all arrays; got sizes {layers}")
    known = {site.path: (len(site.stack), method.rank_axes) for site, method in bank.sites}

    def behind(part: Mapping[str, Arrays]) -> dict[str, Arrays]:
        out: dict[str, Arrays] = {}
        for path, arrays in part.items():
            axes, ranks = known.get(path, (0, {}))
            out[path] = {}
            for name, t in arrays.items():
                turned = ranks.get(name) == -1 and t.ndim > axes + 2
                t = jnp.moveaxis(t, 0, axes)
                out[path][f"{name}[].T" if turned else f"{name}[]"] = t.mT if turned else t
        return out

    frozen, sites = behind(bank.frozen), []
    for site, method in bank.sites:
        group = site.group or GROUP
        frozen[group] = frozen.get(group, {}) | {INDEX: jnp.zeros((), jnp.int32)}
        sites.append((dataclasses.replace(site, group=group), PerExample(method)))
    ((count,),) = sizes
    return ServingBank(Adapter(behind(bank.trainable), frozen, tuple(sites)), count)


SYSTEM = System(
    name="Mixed batches by rows",
    paper="Chen 2023, 2310.18547 (Punica); Sheng 2023, 2311.03285 (S-LoRA)",
    symbol="serving_bank",
    kind="component",
    evidence="each row against its own merged weights; no recompilation; overhead over the base",
    rows=(83,),
)
