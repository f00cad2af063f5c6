"""A fresh adapter for sites that are known: every method's `init`, mapped over stack axes.

The key of a site depends on its path alone, so adding a site changes no other.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Key

from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.types import Dynamic


def key_of(key: Key[jax.Array, ""], text: str) -> Key[jax.Array, ""]:
    """A key for a name, the same in every run and for every set of names.

    Args:
      key: any key.
      text: the name.

    Returns:
      `key`, folded with the CRC-32 of the name.
    """
    return jax.random.fold_in(key, zlib.crc32(text.encode()))


def initialise(
    key: Key[jax.Array, ""], sites: Sequence[tuple[Site, Method]], weights: Mapping[str, Dynamic]
) -> Adapter:
    """A fresh adapter for sites that are known.

    Args:
      key: of random values; folded with each path.
      sites: each with its method; those of one `group` share the tensors of `Method.shared`.
      weights: {path: leaf}, arrays or `jax.ShapeDtypeStruct`; read only by methods that need them.

    Returns:
      The adapter, sites sorted by path.
    """
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

    single = site.slice()

    def one(key, index, w):
        return method.init(key, single, InitContext(single, w, index, common, members))

    if not site.stack:
        return one(key, 0, w)
    n, axes = math.prod(site.stack), [k for k, c in enumerate(site.kinds) if c == "s"]
    if w is not None:
        w = jnp.moveaxis(w, axes, range(len(axes))).reshape(n, *single.shape)
    steps = jnp.arange(n, dtype=jnp.int32)
    arrays = jax.vmap(one, in_axes=(0, 0, None if w is None else 0))(
        jax.random.split(key, n), steps, w
    )
    return jax.tree.map(lambda t: t.reshape(*site.stack, *t.shape[1:]), arrays)
