"""`merge`: what an adapter means; `delta`: what it adds.

Each adapted leaf is seen as matrices [d_in, d_out], one per slice of its stack, and replaced by
`method.merge` of them, computed in at least float32 and cast to the leaf's dtype once. The
parameters given are not touched, and all other leaves are the same objects in the result.

Deviates: nothing.
"""

import jax
from jaxtyping import Float

from jlora.core.adapter import Adapter
from jlora.core.lazy import leaf, merged
from jlora.core.lift import check, flatten, is_array
from jlora.core.method import Method
from jlora.core.site import Site, at_least_float32, fold
from jlora.types import Dynamic, Tree


def merge(params: Tree, adapter: Adapter) -> Tree:
    """The parameters with every adapted leaf merged.

    Args:
      params: a PyTree of arrays and quantised leaves; other leaves pass.
      adapter: one adapter, of sites in `params`.

    Returns:
      The same tree; quantised leaves, adapted or not, come out dense.

    Raises:
      ValueError: a site is not in `params`, or has another shape.
      NotImplementedError: the delta of a method depends on the activation.
    """
    leaves, tree = flatten(params)
    check({k: v for k, v in leaves.items() if is_array(v)}, adapter)
    plain = {k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in leaves.items()}
    for site, method in adapter.sites:
        plain[site.path] = leaf(leaves[site.path], site, method, *adapter.arrays(site)).merged()
    return jax.tree.unflatten(tree, list(plain.values()))


def delta(params: Tree, adapter: Adapter) -> dict[str, Float[jax.Array, "*stack d_in d_out"]]:
    """What an adapter adds to each weight, as dense matrices: for tests and small models.

    Args:
      params: a PyTree of arrays and quantised leaves.
      adapter: one adapter, of sites in `params`.

    Returns:
      {path: merge(w, p) - w}, [*stack, d_in, d_out] in at least float32.

    Raises:
      ValueError: a site is not in `params`, or has another shape.
      NotImplementedError: the delta of a method depends on the activation.
    """
    leaves, _ = flatten(params)
    check({k: v for k, v in leaves.items() if is_array(v)}, adapter)
    return {
        site.path: _delta(leaves[site.path], site, method, *adapter.arrays(site))
        for site, method in adapter.sites
    }


def _delta(w: Dynamic, site: Site, method: Method, own: Dynamic, shared: Dynamic) -> jax.Array:
    m = fold(w.dequantize() if hasattr(w, "dequantize") else w, site.kinds)
    after = merged(method, m, own, shared, len(site.stack))
    return after - m.astype(at_least_float32(m.dtype))
